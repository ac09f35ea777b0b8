"""Why does a model fail at length? What each of its parts does there and is worth. START HERE: diagnosis.py."""
