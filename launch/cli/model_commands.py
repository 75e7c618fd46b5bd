"""The commands that use a trained model: `trainwright sample` and `trainwright score`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from launch.cli.options import AsJson, StoreUri, print_json
from recipes.errors import RequestError

Model = Annotated[str, typer.Argument(metavar="INPUT", help="RUN/STAGE, a store address, or a folder.")]
Prompts = Annotated[
    list[str] | None, typer.Option("--prompt", help="Continue this text, with --grid draw it; may be given again.")
]
Chat = Annotated[bool, typer.Option("--chat", help="Talk: prompts go through the chat template.")]
Images = Annotated[
    list[Path] | None,
    typer.Option("--image", metavar="FILE", help="A vision-language model sees this image; may be given again."),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, max=100_000, help="Longest answer in tokens.")]
Temperature = Annotated[float, typer.Option(min=0.0, max=10.0, help="0 takes the likeliest token.")]
Beams = Annotated[
    int | None, typer.Option(min=1, max=64, help="Search an encoder-decoder's likeliest answer with as many beams.")
]
NumSamples = Annotated[int | None, typer.Option(min=1, max=10_000, help="Answers to each prompt (1), or images (64).")]
Grid = Annotated[Path | None, typer.Option("--grid", metavar="FILE", help="Draw images into this PNG.")]
Label = Annotated[str | None, typer.Option(help="With --grid: only this class.")]
Reconstruct = Annotated[
    str | None, typer.Option(metavar="PATH", help="With --grid: these images, and below them a VAE's.")
]
Interpolate = Annotated[
    tuple[str, str] | None, typer.Option(metavar="A B", help="With --grid: a row from one image to another.")
]
Seed = Annotated[int, typer.Option(min=0, help="Answers and images follow from it.")]


def sample(
    model: Model,
    prompt: Prompts = None,
    chat: Chat = False,
    image: Images = None,
    max_new_tokens: MaxNewTokens = 96,
    temperature: Temperature = 0.7,
    beams: Beams = None,
    num_samples: NumSamples = None,
    grid: Grid = None,
    label: Label = None,
    reconstruct: Reconstruct = None,
    interpolate: Interpolate = None,
    seed: Seed = 0,
    store: StoreUri = None,
    as_json: AsJson = False,
) -> None:
    """Let a model write (--prompt TEXT, --chat for a conversation, both for one answer) or draw (--grid FILE).

    With --image a vision-language model answers about images.
    """
    if image and (grid is not None or not prompt):
        raise RequestError("--image goes with --prompt TEXT, the question about the image")
    if grid is not None:
        done = _draw(model, grid, store, num_samples, seed, label, reconstruct, interpolate, prompt or [])
        print_json(done) if as_json else typer.echo(done["file"])
        return
    if label is not None or reconstruct is not None or interpolate is not None:
        raise RequestError("--label, --reconstruct and --interpolate draw images: add --grid FILE")
    from launch.sampling.text import converse, sample_texts

    if beams is not None and (not prompt or num_samples is not None):
        raise RequestError("--beams searches one answer to each --prompt, without --num-samples")
    if chat and not prompt:
        converse(model, store=store, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        return
    if not prompt:
        raise RequestError("give --prompt TEXT, or --chat for a conversation")
    answers = sample_texts(
        model,
        prompt,
        chat=chat,
        store=store,
        num_samples=num_samples or 1,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        num_beams=beams,
        images=image or (),
    )
    if as_json:
        print_json(answers)
        return
    for answer in answers:
        continues = answer["continues"] and not chat
        typer.echo(answer["prompt"] + answer["response"] if continues else answer["response"])
        if len(answers) > 1:
            typer.echo("---")


def _draw(
    model: str,
    grid: Path,
    store: str | None,
    num_samples: int | None,
    seed: int,
    label: str | None,
    reconstruct: str | None,
    interpolate: tuple[str, str] | None,
    prompts: list[str],
) -> dict[str, Any]:
    from launch.sampling import images as sample_images

    if sum(choice is not None for choice in (label, reconstruct, interpolate, prompts or None)) > 1:
        raise RequestError("give one of --prompt, --label, --reconstruct and --interpolate")
    if reconstruct is not None:
        return sample_images.reconstruct(model, reconstruct, grid, store=store, count=num_samples or 32)
    if interpolate is not None:
        return sample_images.interpolate(model, *interpolate, grid, store=store, steps=num_samples or 10)
    return sample_images.draw_grid(
        model, grid, store=store, num_samples=num_samples or 64, seed=seed, label=label, prompts=prompts
    )


def score(
    model: Model,
    path: Annotated[str, typer.Argument(metavar="PATH", help="An image, a folder or file of images, or digits.")],
    seed: Annotated[int, typer.Option(min=0, help="A VAE's bound is a mean over draws that follow from it.")] = 0,
    store: StoreUri = None,
    as_json: AsJson = False,
) -> None:
    """Rank images: by a VAE's bound, the strangest first; or by a classifier's confidence, the least sure first."""
    from launch.sampling.images import score as score_images

    rows = score_images(model, path, store=store, seed=seed)
    if as_json:
        print_json(rows)
        return
    for row in rows:
        value = f"{row['elbo']:.2f} nats" if "elbo" in row else f"{row['label']}  {row['confidence']:.3f}"
        typer.echo(f"{value}  {row['image']}")
