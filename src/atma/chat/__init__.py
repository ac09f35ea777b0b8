"""Chat templates: which one a model has (template.py) and its rendering, out of reach of anything (renderer.py).

Training data and the server read chats through these alike, so that a model is asked as it was taught.
"""
