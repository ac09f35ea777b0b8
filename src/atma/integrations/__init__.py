"""Our models inside other people's tools, each an extra that nothing else here imports."""
