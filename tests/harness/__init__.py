"""What the tests and measurements of serving stand on: conversations held, cold reads, requests alone and together."""
