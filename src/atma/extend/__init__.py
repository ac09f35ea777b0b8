"""Giving a trained model length: its attention becomes one that goes on beyond what it was trained on."""
