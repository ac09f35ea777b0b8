"""stub"""
def run() -> None:
    """Stub."""
