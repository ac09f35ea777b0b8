"""The engine over HTTP, in the words of OpenAI's API: `atma serve`.

Start at `app.py`, the routes. `guard.py` is what every request passes first, `service.py` the model behind them,
`server.py` the process around it. Needs `pip install atma-lm[serve]`.
"""
