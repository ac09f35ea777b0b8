"""Put a finished run into the package: bfloat16 weights, its tokenizer, its recipe and its whole training log.

python benchmarks/pack_pretrained.py runs/nano nano
"""

import argparse
import shutil
from pathlib import Path

import atma
from atma.checkpoint import file_hash, load_info, load_model, model_files, write_folder

LARGEST = 6_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    options = parser.parse_args()
    model, tokenizer = load_model(options.run / "final")
    files = model_files(model.bfloat16(), tokenizer, load_info(options.run / "final")["extra"])
    files = dict(files) | {"metrics.jsonl": lambda path: shutil.copyfile(options.run / "metrics.jsonl", path)}
    folder = Path(atma.__file__).parent / "pretrained" / options.name
    write_folder(folder, files)
    for path in sorted(folder.iterdir()):
        size = path.stat().st_size
        print(f"{file_hash(path)}  {size:9,}  {path.name}")
        if size > LARGEST:
            raise SystemExit(f"{path} is larger than {LARGEST:,} bytes")


if __name__ == "__main__":
    main()
