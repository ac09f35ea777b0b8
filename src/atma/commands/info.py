"""`atma info`: what is installed, or what a model folder holds."""


def run(model: str | None = None, /) -> None:
    """Show versions, machine, threads and packaged models; or, of a model, its configuration, size and hashes.

    Args:
        model: A packaged model, a model folder or a run folder.
    """
    from atma.info import installation, model_facts

    facts = installation() if model is None else model_facts(model)
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:{width}}  {value}")
