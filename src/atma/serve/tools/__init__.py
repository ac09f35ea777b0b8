"""Calls of tools in what a model writes: the forms that chat templates teach (formats.py), found in the text as it
comes (reading.py), and grammars that allow nothing else (grammar.py).
"""
