"""Commands as one types them, for the end of every `--help`: of each verb, by its words, and of each table of verbs."""

EXAMPLES: dict[str, tuple[str, ...]] = {
    "": (
        "atma generate 'def area(radius):'",
        "atma prepare my_texts/ --out data/mine",
        "atma train recipes/own-data.toml --out runs/mine",
        "atma eval lengths runs/mine",
    ),
    "prepare": (
        "atma prepare stdlib",
        "atma prepare my_texts/ --out data/mine --tokenizer bpe --vocab-size 4096",
        "atma prepare chats.jsonl --model nano --out data/chats",
    ),
    "train": (
        "atma train recipes/nano.toml --out runs/nano --set train.tokens=200000 train.seed=1",
        "atma train --resume --out runs/nano",
        "atma train recipes/fine-tune.toml --from nano --out runs/tuned --track tensorboard",
        "atma train own-data --out runs/many --launch slurm --job nodes=2 gpus_per_node=4",
    ),
    "plan": (
        "atma plan nano",
        "atma plan base-published --gpus 8 --device h100 --mfu 0.3 --json plan.json",
        "atma plan base-published --gpus 1024 --device h200 --set train.length=1048576 train.batch_tokens=134217728",
    ),
    "eval": (
        "atma eval lengths nano",
        "atma eval retrieval runs/mine --budget 10m --page retrieval.html",
        "atma eval diff a.jsonl b.jsonl",
    ),
    "eval lengths": (
        "atma eval lengths nano",
        "atma eval lengths runs/mine --data data/mine --lengths 256 1024 4096 --out rows.jsonl",
        "atma eval lengths --model nano-rope --rope-scaling yarn",
    ),
    "eval likelihood": (
        "atma eval likelihood nano --lengths 512 4096",
        "atma eval likelihood --model runs/mine --texts my_texts/ --out rows.jsonl",
    ),
    "eval tasks": (
        "atma eval tasks nano --tasks hellaswag --limit 100",
        "atma eval tasks --model runs/mine --tasks arc_easy piqa --out rows.jsonl",
    ),
    "eval retrieval": (
        "atma eval retrieval nano --lengths 1024 8192 --budget 10m",
        "atma eval retrieval runs/mine --preset ruler --page retrieval.html",
        "atma eval retrieval --model nano --tasks passkey --out rows.jsonl",
    ),
    "eval reasoning": (
        "atma eval reasoning runs/mine --tasks qa1 qa2 --lengths 0 1024 4096",
        "atma eval reasoning --model nano --tasks qa1 --fine-tune runs/qa1",
    ),
    "eval recall": (
        "atma eval recall --mixers polar rope --budget 30m",
        "atma eval recall --task copy --out recall.jsonl --page recall.html",
    ),
    "eval diff": ("atma eval diff a.jsonl b.jsonl", "atma eval diff a.jsonl b.jsonl --limit 10"),
    "narrow": ("atma narrow nano models/nano-int8", "atma narrow runs/mine models/mine-int4 --weights int4"),
    "diagnose": (
        "atma diagnose nano",
        "atma diagnose runs/mine --data data/mine --size quick",
        "atma diagnose --model nano-rope --text book.txt --page why.html --out why.jsonl",
    ),
    "generate": (
        "atma generate 'def area(radius):'",
        "atma generate 'Once upon a time' --model runs/mine --max-tokens 100 --temperature 0",
        "atma generate --file long_prompt.txt --save-state text.state",
        "atma generate --continue-from text.state",
    ),
    "chat": ("atma chat", "atma chat runs/mine --temperature 0.7", "atma chat --model nano --max-tokens 100"),
    "batch": (
        "atma batch requests.jsonl answers.jsonl",
        "atma batch requests.jsonl answers.jsonl --model runs/mine --memory-budget 2GiB",
    ),
    "serve": (
        "atma serve",
        "atma serve runs/mine --port 8080",
        "atma serve --model nano --memory-budget 2GiB --cache-dir cache",
    ),
    "demo": ("atma demo", "atma demo --minutes 30 --seeds 3 --out runs/demo-30", "atma demo --text book.txt"),
    "sweep": (
        "atma sweep plan recipes/sweep-nano.toml",
        "atma sweep run recipes/sweep-nano.toml --workers 4",
        "atma sweep analyse runs/sweep-nano",
    ),
    "sweep run": (
        "atma sweep run recipes/sweep-nano.toml --workers 4",
        "atma sweep run recipes/sweep-nano.toml --retry",
        "atma sweep run recipes/sweep-nano.toml --launch slurm --workers 8 --job gpus_per_node=1",
    ),
    "sweep work": (
        "atma sweep work recipes/sweep-nano.toml",
        "atma sweep work recipes/sweep-nano.toml --out runs/shared --device cuda:1",
    ),
    "sweep status": ("atma sweep status runs/sweep-nano", "atma sweep status recipes/sweep-nano.toml"),
    "sweep plan": ("atma sweep plan recipes/sweep-nano.toml", "atma sweep plan recipes/sweep-nano.toml --measure"),
    "sweep analyse": (
        "atma sweep analyse runs/sweep-nano",
        "atma sweep analyse runs/sweep-nano --metric clean_nll_4096 --where polar+memory --json effects.json",
    ),
    "sweep dashboard": (
        "atma sweep dashboard runs/sweep-nano",
        "atma sweep dashboard runs/sweep-nano --out sweep.html --title 'Which memory'",
    ),
    "compare": ("atma compare run", "atma compare table runs/compare"),
    "compare run": (
        "atma compare run",
        "atma compare run --mixers polar rope gla --tokens 500000 --out runs/three",
        "atma compare run --out runs/three --retry",
    ),
    "compare table": ("atma compare table", "atma compare table runs/three"),
    "compare work": (
        "atma compare work runs/three/compare.json",
        "atma compare work runs/three/compare.json --device cuda:1 --threads 2",
    ),
    "bench": (
        "atma bench ops --operations polar conv --lengths 1024",
        "atma bench decode --contexts 1024 16384 --device cpu --threads 1",
        "atma bench train --preset small --out runs/bench-train",
    ),
    "import": (
        "atma import hf:models/qwen models/qwen-atma",
        "atma import published_checkpoint models/published --tokenizer tokenizer.json",
    ),
    "export": (
        "atma export models/qwen-atma models/qwen-out",
        "atma export runs/tuned models/qwen-tuned --dtype bfloat16",
    ),
    "merge": (
        "atma merge nano runs/tuned/adapters models/merged",
        "atma merge runs/mine runs/tuned/checkpoints/step-00000200 models/merged",
    ),
    "compress": (
        "atma compress runs/mine models/narrow --texts my_texts/",
        "atma compress nano models/narrow --texts my_texts/ --tolerance 0.02 --tokens 32768",
    ),
    "extend": (
        "atma extend nano-rope runs/longer",
        "atma extend runs/mine runs/longer --data data/mine --tokens 200000",
        "atma extend nano-rope runs/longer --resume",
    ),
    "compile": ("atma compile", "atma compile --levels x86-64-v3 x86-64-v4"),
    "info": ("atma info", "atma info nano", "atma info --model runs/mine"),
    "runs": (
        "atma runs",
        "atma runs runs/nano runs/short --page curves.html",
        "atma runs --sort validation --json",
    ),
    "completion": (
        "atma completion bash > ~/.local/share/bash-completion/completions/atma",
        "atma completion zsh > ~/.zfunc/_atma",
        "atma completion fish > ~/.config/fish/completions/atma.fish",
    ),
}
