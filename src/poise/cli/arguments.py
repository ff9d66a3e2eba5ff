"""Arguments and options that several commands of `poise` share: their names, their types, their help.

A flag that its metavar spells is named: Typer 0.27 takes the metavar for the flag, `--DEVICE` for `--device`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A Hugging Face checkpoint (safetensors): its directory, or its id on the hub."
    ),
]
Prompts = Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="Texts to continue.")]
PromptFile = Annotated[
    str | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help='Read prompts from a .jsonl file ({"prompt": "..."} or {"prompt_token_ids": [...]} a line, each with '
        "optional id, max_tokens, temperature, top_p, top_k, seed, stop), from a .txt file (a prompt a line), or JSONL "
        "from standard input (-).",
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Write results to this JSONL file, in order of input, once all are there. Until then they are in FILE.partial, "
        "which an interrupted run keeps for --resume if it holds any.",
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run that wrote to --output.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace --output, and forget an interrupted run to it.")]
MaxTokens = Annotated[int, typer.Option(metavar="N", help="Most tokens to generate for a prompt.")]
Memory = Annotated[
    str,
    typer.Option(
        metavar="SIZE", help="Memory for weights, caches and buffers, such as 8GiB; auto: what is free, less a margin."
    ),
]
Device = Annotated[
    str, typer.Option("--device", metavar="DEVICE", help="Where to compute: auto (the CPU), cpu or cuda.")
]
DeviceMemory = Annotated[
    str,
    typer.Option(
        metavar="SIZE",
        help="With --device cuda, of the GPU's memory, such as 24GiB; auto: what is free there, less a margin. Experts come to "
        "it from --memory, which holds all of them or, where it is too small, those needed next. Caches may lie there, too.",
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="Number type to compute in: auto (the checkpoint's, unless this device is far slower at it), bfloat16, "
        "float16, float32.",
    ),
]
MachineFile = Annotated[
    Path | None,
    typer.Option("--machine", metavar="FILE", help="What `poise profile` measured; else measured briefly, once."),
]
TimelineFile = Annotated[
    Path | None,
    typer.Option(
        "--timeline",
        metavar="FILE",
        help="Write what ran when, as a Chrome trace, which Perfetto opens; without ranks also of a run that is interrupted.",
    ),
]
Quantize = Annotated[
    str,
    typer.Option(
        metavar="none|int4",
        help="int4: round the experts to 4 bits, once, into a copy in the cache directory (~/.cache/poise), and run from that.",
    ),
]
TableFile = Annotated[
    Path | None,
    typer.Option(
        "--correlation-table",
        metavar="FILE",
        help="Begin with the correlation table that `poise record` or --save-table wrote for this model.",
    ),
]
SaveTable = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Write the correlation table as learnt by the end, also of a run that is interrupted."
    ),
]
Temperature = Annotated[float, typer.Option(metavar="T", help="Randomness of the choice of tokens; 0 is greedy.")]
TopP = Annotated[float, typer.Option(metavar="P", help="Choose among the likeliest tokens that sum to P.")]
TopK = Annotated[int | None, typer.Option(metavar="K", help="Choose among the K likeliest tokens.")]
Seed = Annotated[int | None, typer.Option(metavar="S", help="Makes a sampled text repeat.")]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End a text before this string; repeatable.")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Generate on after the end-of-sequence token.")]
ExpertParallel = Annotated[
    bool,
    typer.Option(
        "--expert-parallel", help="One rank of several that share the experts; start it with torchrun on each."
    ),
]
Balance = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="With --expert-parallel, what keeps ranks even. static: experts stay in place; eplb: they move so that ranks "
        "get like numbers of tokens; vibe: so that slow and fast ranks end together; probe: copies of hot experts come for "
        "each step, as predicted; probe+vibe: both; auto: probe on several ranks of CPUs, else static.",
    ),
]
LookaheadFile = Annotated[
    Path | None,
    typer.Option(
        "--lookahead",
        metavar="FILE",
        help="What `poise distill` wrote for this model: copies of experts (probe), or experts from disk, come by it. Without, "
        "ranks ask the model's own routers early, and one process its correlation table.",
    ),
]
Online = Annotated[
    bool,
    typer.Option(
        "--online",
        help="Have the lookahead of --lookahead go on learning from what is generated, for 2 to 5 % of the time and for this "
        "run only; ranks may begin without a file.",
    ),
]
ReplicaSlots = Annotated[
    int | None,
    typer.Option(metavar="N", help="With --balance probe, the most copies a rank gets for a step; 3 if not given."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
