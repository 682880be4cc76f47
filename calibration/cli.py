"""The command `offq`."""

import errno
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from calibration.compare_command import compare
from calibration.data_sources import BUILT_IN, SELF
from calibration.eval_command import evaluate
from calibration.inspect_command import inspect
from calibration.settings import (
    ActivationBits,
    Basis,
    DTypeName,
    EmbeddingBits,
    GPTQInputs,
    GPTQOrder,
    HeadBasis,
    HeadBits,
    KVBits,
    RecipeName,
    Rounding,
    Settings,
)
from vllm_offq.errors import UserError


def _clip_ratio(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:  # a word: Settings knows the one that there is
        return text


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Quantize language models to 4-bit weights, activations and KV cache (OffQ).",
)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, hub id or GGUF file.")],
    out: Annotated[Path, typer.Argument(help="Folder for the checkpoint; it must not exist.")],
    calibration: Annotated[
        list[str],
        typer.Option(
            metavar="SOURCE[=WEIGHT]",
            default_factory=lambda: [SELF],
            show_default=SELF,
            help=f"`{SELF}` (text that the model writes), {', '.join(BUILT_IN)}, a text file, "
            "a jsonl, json, parquet or csv file (FILE or FILE:COLUMN), or a dataset's name with "
            ":CONFIG, :SPLIT and :COLUMN, of texts or chat messages. May be given several times; "
            "weights are shares of the samples.",
        ),
    ],
    samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 32,
    sequence_length: Annotated[int, typer.Option(help="Tokens of each.")] = 512,
    recipe: Annotated[
        RecipeName, typer.Option(help="quarot and rtn are there to compare with.")
    ] = "offq",
    weights: Annotated[
        Rounding | None, typer.Option(help="How weights are rounded; default: the recipe's.")
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(help="Channels that share a scale; default 128, or 64 where it must be."),
    ] = None,
    weight_group_size: Annotated[
        int | None,
        typer.Option(
            help="Of weight scales: the group size or a multiple; default: one per output channel."
        ),
    ] = None,
    basis: Annotated[
        Basis,
        typer.Option(help="Of the residual stream; auto tries all. top-1 is the paper's."),
    ] = "auto",
    head_basis: Annotated[
        HeadBasis, typer.Option(help="What keys and values of each head are rotated by.")
    ] = "principal",
    clip_ratio: Annotated[
        Any,
        typer.Option(
            parser=_clip_ratio,
            metavar="RATIO|auto",
            help="Of activations' ranges; default: the recipe's, 1 for 8 bits; auto chooses one "
            "for each site.",
        ),
    ] = None,
    gptq_inputs: Annotated[
        GPTQInputs,
        typer.Option(
            help="Minimise errors on the original's inputs, on those through the layers quantized "
            "before, or on these with weights that make up for the difference."
        ),
    ] = "original",
    gptq_order: Annotated[
        GPTQOrder,
        typer.Option(help="Round channels as they are, or those of most energy first."),
    ] = "channels",
    refits: Annotated[
        int, typer.Option(help="Rounds of fitting scales and codes to each other after GPTQ.")
    ] = 1,
    refine: Annotated[
        int,
        typer.Option(
            metavar="STEPS",
            help="In the end, learn scales and norm gains from the original's predictions; the "
            "whole model must fit in memory twice. 0: do not.",
        ),
    ] = 0,
    activation_bits: Annotated[
        ActivationBits, typer.Option(help="Of what the linears multiply the 4-bit weights with.")
    ] = "4",
    kv_bits: Annotated[KVBits, typer.Option(help="16 keeps vLLM's own cache.")] = "4",
    head_bits: Annotated[
        HeadBits, typer.Option(help="Of the output head; 16 leaves it as it is.")
    ] = "8",
    embedding_bits: Annotated[
        EmbeddingBits, typer.Option(help="Of the token embedding; 16 leaves it as it is.")
    ] = "16",
    dtype: Annotated[DTypeName, typer.Option(help="Of what stays unquantized.")] = "auto",
    device: Annotated[
        str,
        typer.Option(help="What computes: cpu, cuda, cuda:N or auto (all GPUs); a block must fit."),
    ] = "cpu",
    seed: Annotated[int, typer.Option(help="Same seed, same input, same bytes.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT at the end.")] = False,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--no-resume", help="Go on with an interrupted run to OUT, or discard it."
        ),
    ] = None,
) -> None:
    """Quantize a model to 4-bit weights, activations and KV cache."""
    settings = Settings(
        recipe=recipe,
        weights=weights,
        group_size=group_size,
        weight_group_size=weight_group_size,
        basis=basis,
        head_basis=head_basis,
        clip_ratio=clip_ratio,
        gptq_inputs=gptq_inputs,
        gptq_order=gptq_order,
        refits=refits,
        refine=refine,
        activation_bits=activation_bits,
        kv_bits=kv_bits,
        head_bits=head_bits,
        embedding_bits=embedding_bits,
        calibration=tuple(calibration),
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        dtype=dtype,
    )
    from calibration.quantize_command import run  # torch and transformers are slow to import

    run(model, out, settings, device, overwrite, resume)


app.command()(inspect)
app.command("eval")(evaluate)
app.command()(compare)


def main() -> None:
    """Run the command; a user's mistake ends in one sentence and exit code 2."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary folders go
    try:
        app()
    except UserError as error:
        print(f"offq: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        print(f"offq: {error.filename} is too long a name; choose a shorter one", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
