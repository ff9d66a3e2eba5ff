"""`poise generate` and `poise plan`: running a model, and what would run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from poise.cli.arguments import (
    Balance,
    Device,
    DeviceMemory,
    Dtype,
    ExpertParallel,
    IgnoreEos,
    Json,
    LookaheadFile,
    MachineFile,
    MaxTokens,
    Memory,
    Model,
    Online,
    Output,
    Overwrite,
    PromptFile,
    Prompts,
    Quantize,
    ReplicaSlots,
    Resume,
    SaveTable,
    Seed,
    Stop,
    TableFile,
    Temperature,
    TimelineFile,
    TopK,
    TopP,
)
from poise.cli.generate import run_generate
from poise.cli.generate_options import GenerateOptions
from poise.engine.sampling import SamplingParams

commands = typer.Typer()


@commands.command(
    epilog="Examples:\n\n"
    'poise generate ./OLMoE-1B-7B "The capital of France is" --max-tokens 32\n\n'
    "poise generate ./Mixtral-8x7B --prompts in.jsonl --output out.jsonl --memory 16GiB --resume\n\n"
    "poise generate ./Mixtral-8x7B --prompts in.jsonl --output out.jsonl --device cuda --device-memory 24GiB\n\n"
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
    device_memory: DeviceMemory = "auto",
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
    balance: Balance = "auto",
    lookahead: LookaheadFile = None,
    online: Online = False,
    replica_slots: ReplicaSlots = None,
    json_output: Json = False,
) -> None:
    """Continues texts with a model whose experts are streamed from disk under a memory budget.

    One prompt is streamed to standard output as it is generated; several are printed in order of input.

    With --expert-parallel, started by torchrun, several processes (ranks) share the experts, each with its part in memory.

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
            device_memory=device_memory,
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
            lookahead=lookahead,
            online=online,
            replica_slots=replica_slots,
        )
    )


@commands.command(
    epilog="Examples:\n\n"
    "poise plan ./Mixtral-8x7B --memory 16GiB --prompts in.jsonl\n\n"
    "poise plan ./OLMoE-1B-7B --memory 4GiB --num-requests 256 --prompt-tokens 512 --max-tokens 32\n\n"
    "poise plan ./Mixtral-8x7B --device cuda --device-memory 24GiB --num-requests 256 --prompt-tokens 512",
)
def plan(
    model: Model,
    prompt_file: PromptFile = None,
    num_requests: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Without --prompts: how many requests to plan for, at most 100,000; 32 if not given."
        ),
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(metavar="P", help="Without --prompts: tokens of each prompt; 64 if not given.")
    ] = None,
    max_tokens: MaxTokens = 64,
    memory: Memory = "auto",
    device: Device = "auto",
    device_memory: DeviceMemory = "auto",
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
    """Shows what would run and why: batches, memory, disk, speed predicted and with perfect overlap. Runs nothing.

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
            device_memory=device_memory,
            dtype=dtype,
            quantize=quantize,
            machine=machine,
            correlation_table=correlation_table,
            trace=trace,
            sampling=SamplingParams(max_tokens=max_tokens),
            json_output=json_output,
        )
    )
