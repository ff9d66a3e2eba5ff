"""What a user can type: the commands of `poise`, their options, their help.

Contract: the commands and flags are those of the architecture page; each help holds an example; nothing here imports
torch or transformers before a command needs them, so that `poise --help` answers at once.
Not here: what a command does. It checks nothing but types; ranges are checked where the values are used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import poise
from poise.cli.generate import GenerateOptions, run_generate
from poise.engine.sampling import SamplingParams

app = typer.Typer(
    name="poise",
    help="Runs mixture-of-experts language models that are larger than memory.",
    epilog='Example: poise generate ./OLMoE-1B-7B "The capital of France is" --memory 4GiB',
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"poise {poise.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None and (text := context.get_help()):  # with Rich it prints, and returns nothing
        typer.echo(text)


Model = Annotated[str, typer.Argument(metavar="MODEL", help="Directory of a Hugging Face checkpoint (safetensors).")]
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
Device = Annotated[str, typer.Option(metavar="DEVICE", help="Where to compute: auto or cpu; ranks: cuda, too.")]
Dtype = Annotated[
    str,
    typer.Option(
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
    typer.Option("--timeline", metavar="FILE", help="Write what ran when, as a Chrome trace, which Perfetto opens."),
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
        metavar="static|eplb|vibe",
        help="With --expert-parallel, where experts lie: where they are at first (static), so that ranks get like numbers of "
        "tokens (eplb), or so that ranks end together, slow ones and fast ones (vibe).",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]


@app.command(
    epilog="Examples:\n\n"
    'poise generate ./OLMoE-1B-7B "The capital of France is" --max-tokens 32\n\n'
    "poise generate ./Mixtral-8x7B --prompts in.jsonl --output out.jsonl --memory 16GiB --resume\n\n"
    "torchrun --nproc-per-node 2 -m poise generate ./OLMoE-1B-7B --prompts in.jsonl --expert-parallel",
)
def generate(
    model: Model,
    prompts: Prompts = None,
    prompt_file: PromptFile = None,
    output: Output = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    max_tokens: MaxTokens = 64,
    memory: Memory = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = "none",
    machine: MachineFile = None,
    timeline: TimelineFile = None,
    correlation_table: TableFile = None,
    save_table: SaveTable = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Stop = None,
    ignore_eos: IgnoreEos = False,
    expert_parallel: ExpertParallel = False,
    balance: Balance = "static",
    json_output: Json = False,
) -> None:
    """Continues texts with a model whose experts are streamed from disk under a memory budget.

    One prompt is streamed to standard output as it is generated; several are printed in order of input.

    Results for programs: --output, or --json ({"results": [...], "stats": {...}, "plan": {...}}).
    """
    sampling = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
    )
    run_generate(
        GenerateOptions(
            model=model,
            prompts=tuple(prompts or ()),
            prompt_file=prompt_file,
            output=output,
            resume=resume,
            overwrite=overwrite,
            memory=memory,
            device=device,
            dtype=dtype,
            quantize=quantize,
            machine=machine,
            timeline=timeline,
            correlation_table=correlation_table,
            save_table=save_table,
            sampling=sampling,
            json_output=json_output,
            expert_parallel=expert_parallel,
            balance=balance,
        )
    )


@app.command(
    epilog="Examples:\n\n"
    "poise plan ./Mixtral-8x7B --memory 16GiB --prompts in.jsonl\n\n"
    "poise plan ./OLMoE-1B-7B --memory 4GiB --num-requests 256 --prompt-tokens 512 --max-tokens 32",
)
def plan(
    model: Model,
    prompt_file: PromptFile = None,
    num_requests: Annotated[
        int | None, typer.Option(metavar="N", help="Without --prompts: how many requests to plan for; 32 if not given.")
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(metavar="P", help="Without --prompts: tokens of each prompt; 64 if not given.")
    ] = None,
    max_tokens: MaxTokens = 64,
    memory: Memory = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = "none",
    machine: MachineFile = None,
    correlation_table: TableFile = None,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where tokens go, as `poise record --output` wrote it; else uniform."),
    ] = None,
    json_output: Json = False,
) -> None:
    """Shows what would run and why: batches, memory, disk, predicted speed and its limit. Runs nothing.

    Times are those of this machine, measured briefly once, or of --machine.
    """
    from poise.cli.plan import PlanOptions, run_plan

    run_plan(
        PlanOptions(
            model=model,
            prompt_file=prompt_file,
            num_requests=num_requests,
            prompt_tokens=prompt_tokens,
            memory=memory,
            device=device,
            dtype=dtype,
            quantize=quantize,
            machine=machine,
            correlation_table=correlation_table,
            trace=trace,
            sampling=SamplingParams(max_tokens=max_tokens),
            json_output=json_output,
        )
    )


@app.command(epilog="Example: poise demo")
def demo(json_output: Json = False) -> None:
    """Runs a small model with real routing under a tight memory budget, beside the plain baseline."""
    from poise.bench.demo import run_demo

    run_demo(json_output=json_output)


@app.command(
    epilog="Examples:\n\n"
    "poise profile ./OLMoE-1B-7B --output machine.json --report machine.html\n\n"
    "poise profile --merge gpu0.json gpu1.json --output machine.json",
)
def profile(
    model: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL|FILE...",
            help="Checkpoint whose shapes to measure, else those of common models; with --merge machine files.",
        ),
    ] = None,
    merge: Annotated[
        bool,
        typer.Option("--merge", help="Put machine files of single devices together, and show how far they are apart."),
    ] = False,
    device: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Device to measure, as torch names it (cuda:0, cpu); repeatable, each in turn. Else all accelerators where "
            "there are several, or the processor.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the machine to this JSON file.")
    ] = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the curves on this HTML page.")] = None,
    json_output: Json = False,
) -> None:
    """Measures this machine: time against tokens of a model's experts, attention, gate and head; memory; disk.

    Each figure is a median; ± is its 95 % interval, followed by ? where time was up before it was within 5 %. With fewer
    than 6 runs there is none.
    """
    if merge:
        from poise.cli.merge import run_merge

        run_merge(files=model or (), output=output, report=report, json_output=json_output)
        return
    from poise.cli.profile import only_model, run_profile

    run_profile(
        model=only_model(model or ()), output=output, report=report, json_output=json_output, devices=device or ()
    )


@app.command(epilog="Example: poise record ./OLMoE-1B-7B --prompts in.jsonl --output trace.safetensors --memory 4GiB")
def record(
    model: Model,
    prompts: Annotated[
        str, typer.Option(metavar="FILE", help="Prompts, as `poise generate --prompts` reads them: .jsonl, .txt, or -.")
    ],
    output: Annotated[Path, typer.Option(metavar="FILE", help="Write the routing trace to this file (safetensors).")],
    table: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the correlation table, from which is read ahead.")
    ] = None,
    max_tokens: MaxTokens = 64,
    memory: Memory = "auto",
    json_output: Json = False,
) -> None:
    """Runs prompts and records how many tokens each expert gets, layer by layer and pass by pass.

    Every token counts, those of the prompts and those generated; padding does not.
    """
    from poise.cli.record import RecordOptions, run_record

    sampling = SamplingParams(max_tokens=max_tokens)
    run_record(
        RecordOptions(
            model=model,
            prompt_file=prompts,
            output=output,
            table=table,
            memory=memory,
            sampling=sampling,
            json_output=json_output,
        )
    )


@app.command(
    epilog="Examples:\n\n"
    "poise place --trace trace.safetensors --machine h200 --shape 2048x768:bfloat16 --ranks 8 --output placement.json\n\n"
    "poise place --trace /tmp/expert_distribution_recorder_17.pt --machine machine.json --ranks 8 --slots-per-rank 33 "
    "--current old.json --max-moves 50 --format sglang --output new.json --report new.html",
)
def place(
    trace: Annotated[
        list[Path],
        typer.Option(
            metavar="FILE",
            help="Recorded statistics: a routing trace, the vLLM plug-in's log, a dump of SGLang's recorder (.pt; one --trace "
            "for each rank's file, or their folder), or TensorRT-LLM's folder.",
        ),
    ],
    machine: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="h100, h200, spread-7, spread-22, one-slow, or a machine file.")
    ],
    ranks: Annotated[int, typer.Option(metavar="R", help="Expert-parallel ranks, one on each device of the machine.")],
    slots_per_rank: Annotated[
        int | None, typer.Option(metavar="S", help="Experts of a layer that a rank holds, replicas included.")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(metavar="HxI:DTYPE", help="Which of the machine's curves, such as 4096x1536:bfloat16."),
    ] = None,
    current: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The placement now, in any of the formats; else contiguous, moves not counted."
        ),
    ] = None,
    max_moves: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Most experts to move to another rank, all layers together; else those that save 0.1 % of their layer's time.",
        ),
    ] = None,
    ranks_per_node: Annotated[
        int | None,
        typer.Option(metavar="N", help="Consecutive ranks with fast links between them, for --expert-groups."),
    ] = None,
    expert_groups: Annotated[
        int | None,
        typer.Option(metavar="G", help="Groups of experts (group-limited routing) that stay whole on a node each."),
    ] = None,
    file_format: Annotated[
        str,
        typer.Option(
            "--format", metavar="poise|sglang|trtllm", help="Of --output: placement.json, SGLang's, TensorRT-LLM's."
        ),
    ] = "poise",
    first_layer: Annotated[
        int | None, typer.Option(metavar="N", help="First layer with experts, where statistics (vLLM's) do not say.")
    ] = None,
    num_layers: Annotated[
        int | None, typer.Option(metavar="N", help="Layers of the model, for SGLang; else up to the last with experts.")
    ] = None,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the placement to this file.")] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw time per layer and device, before and after, on this HTML page."),
    ] = None,
    json_output: Json = False,
) -> None:
    """Places experts so that unequal devices finish each layer together, from recorded statistics and measured curves.

    Prints the predicted time of the experts in a mean step now, planned, token-balanced and at best, the moves, and whether the
    gain is above its noise.
    """
    from poise.cli.place import PlaceOptions, run_place

    run_place(
        PlaceOptions(
            traces=tuple(trace),
            machine=machine,
            ranks=ranks,
            slots_per_rank=slots_per_rank,
            shape=shape,
            current=current,
            max_moves=max_moves,
            ranks_per_node=ranks_per_node,
            expert_groups=expert_groups,
            file_format=file_format,
            first_layer=first_layer,
            num_layers=num_layers,
            output=output,
            report=report,
            json_output=json_output,
        )
    )


@app.command(epilog="Example: poise bench reader --output benchmarks/results")
def bench(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Which benchmark.")],
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the result file to this directory.")] = None,
    part: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PART", help="Of a long benchmark, run this part only (may be repeated); keep the others."
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Of a long benchmark, measure so many decode steps and count the rest as their mean."
        ),
    ] = None,
    json_output: Json = False,
) -> None:
    """Runs a benchmark beside its peers, and prints how close each comes to the physical limit."""
    from poise.bench import run_benchmark

    run_benchmark(name, output=output, json_output=json_output, parts=part or (), steps=steps)
