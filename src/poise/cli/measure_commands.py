"""`poise profile`, `record`, `distill` and `place`: what is measured and learnt of a machine and a model, and its use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from poise.cli.arguments import Json, MaxTokens, Memory, Model
from poise.engine.sampling import SamplingParams

commands = typer.Typer()


@commands.command(
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


@commands.command(
    epilog="Example: poise record ./OLMoE-1B-7B --prompts in.jsonl --output trace.safetensors --memory 4GiB"
)
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


@commands.command(
    epilog="Example: poise distill ./OLMoE-1B-7B --prompts text.jsonl --output lookahead.safetensors --memory 4GiB"
)
def distill(
    model: Model,
    prompts: Annotated[
        str,
        typer.Option(
            metavar="FILE", help="Text to learn from, a document a line, as `poise generate --prompts` reads it."
        ),
    ],
    output: Annotated[
        Path, typer.Option(metavar="FILE", help="Write the predictors to this file, for `poise generate --lookahead`.")
    ],
    width: Annotated[int | None, typer.Option(metavar="N", help="Of each layer's residual; else 128.")] = None,
    epochs: Annotated[int, typer.Option(metavar="N", help="How often the text is learnt from.")] = 1,
    control: Annotated[
        bool | None,
        typer.Option(
            "--control/--no-control",
            help="Also run an untrained model of the same configuration, which is written to disk for it; else if under 2 GiB.",
        ),
    ] = None,
    memory: Memory = "auto",
    json_output: Json = False,
) -> None:
    """Trains lookahead predictors: which experts a layer will need, told from the hidden states one MoE layer before.

    A tenth of the documents is held out; on it prints per layer how many of a token's experts are named, how far counts are
    off, and what imbalance is left when replicas are planned on predicted counts: frozen routers, distilled ones, the
    correlation table, frequencies, and the routers of an untrained model.
    """
    from poise.cli.distill import DistillOptions, run_distill

    run_distill(
        DistillOptions(
            model=model,
            prompt_file=prompts,
            output=output,
            width=width,
            epochs=epochs,
            control=control,
            memory=memory,
            json_output=json_output,
        )
    )


@commands.command(
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
            help="Most experts to move to another rank, in all layers; else those that save 0.05 % of their layer's time.",
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
