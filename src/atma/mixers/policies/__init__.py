"""Selection policies: how a trained attention layer reads less of its keys and values, chosen at run time."""
