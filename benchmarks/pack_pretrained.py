"""Put a finished run into the package: bfloat16 weights, its tokenizer, its recipe and its whole training log.

The recipe must be the one that made the run, but for what cannot have changed the training: its name, where its data
lay, and what polar attention does beyond a count limit that no row of the run reached.

    python benchmarks/pack_pretrained.py recipes/nano.toml runs/nano nano
"""

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import atma
from atma.checkpoint import load_info, load_model, model_files
from atma.config import Recipe, identity, load_recipe, to_dict
from atma.folders import file_hash, write_folder
from atma.model import Model

LARGEST = 6_000_000


def check(run: Recipe, recipe: Recipe) -> None:
    """End unless the recipe made the run."""
    limit = recipe.model.count_limit
    if limit is not None and limit < run.train.length:
        raise SystemExit(f"a count_limit of {limit} would have changed a run of length {run.train.length}")
    model = replace(run.model, count_limit=limit, sharpening=recipe.model.sharpening)
    data = replace(run.data, path=recipe.data.path)
    if replace(run, name=recipe.name, data=data, model=model) != recipe:
        raise SystemExit("the recipe is not the one that made the run")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=load_recipe)
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    options = parser.parse_args()
    check(load_recipe(options.run / "recipe.toml"), options.recipe)
    trained, tokenizer = load_model(options.run / "final")
    model = Model(options.recipe.model)
    model.load_state_dict(trained.state_dict())
    extra = load_info(options.run / "final")["extra"]
    extra |= {"name": options.recipe.name, "recipe": to_dict(options.recipe), "identity": identity(options.recipe)}
    files = dict(model_files(model.bfloat16(), tokenizer, extra))
    files["metrics.jsonl"] = lambda path: shutil.copyfile(options.run / "metrics.jsonl", path)
    folder = Path(atma.__file__).parent / "pretrained" / options.name
    write_folder(folder, files)
    for path in sorted(folder.iterdir()):
        size = path.stat().st_size
        print(f"{file_hash(path)}  {size:9,}  {path.name}")
        if size > LARGEST:
            raise SystemExit(f"{path} is larger than {LARGEST:,} bytes")


if __name__ == "__main__":
    main()
