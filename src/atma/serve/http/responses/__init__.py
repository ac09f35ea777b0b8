"""OpenAI's Responses: what is asked (body.py, items.py), the answer as items and events (answer.py), the answers that
are kept for a next turn (store.py), and the routes (routes.py).
"""
