"""`jaxmodels sample RUN`: texts, transcripts, sounds or pictures of a run."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from jaxmodels.errors import UserError, check_place, printable
from jaxmodels.fields import Count, KVCache, Range, Seed, Weight

if TYPE_CHECKING:
    from jaxmodels.train.saved import Run


def sample(
    run: str,
    /,
    prompt: str | None = None,
    tokens: Count | None = None,
    temperature: Annotated[float, Range(0)] | None = None,
    top_k: Count | None = None,
    top_p: Annotated[float, Range(above=0, most=1)] | None = None,
    repetition_penalty: Annotated[float, Range(above=0)] | None = None,
    seed: Seed | None = None,
    seconds: Annotated[float, Range(above=0, most=3600)] | None = None,
    count: Annotated[int, Range(1, 1000)] | None = None,
    guidance: Weight | None = None,
    steps: Count | None = None,
    out: Path | None = None,
    best: bool = False,
    kv_cache: KVCache | None = None,
) -> None:
    """Generate with a run: text that continues the prompt, its translation (by beam search), the transcript of a sound,
    a sound, or pictures.

    Args:
        run: run directory.
        prompt: how the text begins (default: a line end), the text to translate, the file of the sound to transcribe,
            or what the sound is to be of, such as 'seven, george' if it was trained with labels and groups; of pictures
            a class or a text (default: all classes in turn, or anything).
        tokens: how many tokens to add; default 200, or as many as fit into the model's context.
        temperature: 0 takes the likeliest token each time; higher is more varied; default: what the files of an
            imported model ask for, as for the next two, or 0.8.
        top_k: choose among the k likeliest tokens only.
        top_p: choose among the likeliest tokens that together have this probability.
        repetition_penalty: above 1 makes tokens that the text already has less likely; default: what the files of an
            imported model ask for, or 1.
        seed: the same seed gives the same text, sound or pictures; default 0.
        seconds: length of a sound; default 1.
        count: number of pictures; default 16.
        guidance: how closely pictures follow the prompt; default: as in the run's config.
        steps: steps from noise to picture; default: as in the run's config.
        out: WAV or PNG to write a sound or pictures into; default sample.wav or sample.png in the run directory.
        best: use the best checkpoint instead of the newest.
        kv_cache: int8 holds keys and values of a text as codes of a byte, a quarter of their memory in float32 and half
            of it in bfloat16; the text may be another one.
    """
    from jaxmodels import config as configs
    from jaxmodels.generate import asked
    from jaxmodels.generate.texts import continued, opening
    from jaxmodels.tasks import tasks_that_answer
    from jaxmodels.train import load_run
    from jaxmodels.train.run import compilation_cache

    compilation_cache()
    options = {"tokens": tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    options |= {"repetition_penalty": repetition_penalty, "kv_cache": kv_cache}
    given = {name: value for name, value in options.items() if value is not None}
    idle = [name for name in ("top_k", "top_p", "seed") if name in given]
    if temperature == 0 and idle:
        flag = f"--{idle[0].replace('_', '-')}"
        raise UserError(
            f"got {flag} {given[idle[0]]} with --temperature 0, at which nothing is drawn, expected a temperature "
            f"above 0, try it without {flag}"
        )
    cfg, _ = configs.read(run)
    opened = load_run(run, best=best) if not cfg.task.answers else None
    drawn = {"seconds": seconds, "count": count, "guidance": guidance, "steps": steps, "out": out}
    wanted = {name: value for name, value in drawn.items() if value is not None}
    kinds = {
        "sounds": {"temperature", "seed", "seconds", "out"},
        "pictures": {"seed", *drawn} - {"seconds"},
        "texts": set(options),
    }
    kind = "texts"
    if opened is not None:
        kind = "sounds" if opened.task.sounds is not None else "pictures" if opened.task.samples is not None else kind
    for name in [*given, *wanted]:
        if name not in kinds[kind]:
            flag, where = f"--{name.replace('_', '-')}", " or ".join(each for each in kinds if name in kinds[each])
            raise UserError(f"got {flag} for a run of {cfg.task.kind}, expected it for one of {where}, try it without")
    if opened is not None and kind == "sounds":
        _sound(opened, prompt, seconds or 1.0, out, given)
        return
    if opened is not None and kind == "pictures":
        _pictures(opened, prompt, count or 16, seed or 0, out, {"guidance": guidance, "sample_steps": steps})
        return
    if cfg.task.answers not in ("continuation", "translation", "transcript"):
        instead = "predict" if cfg.task.answers else "report"
        files = " FILE" if instead == "predict" else ""
        raise UserError(
            f"got a run of task {cfg.task.kind}, expected "
            f"{tasks_that_answer('continuation', 'translation', 'transcript')}, "
            f"try jaxmodels {instead} {run}{files}"
        )
    if cfg.task.answers != "continuation":
        heard = cfg.task.answers == "transcript"
        if given:
            flag, who = next(iter(given)).replace("_", "-"), "recognizer" if heard else "translator"
            raise UserError(f"got --{flag} for a {who}, expected a --prompt alone, try it without --{flag}")
        if not prompt:
            what = "sound to transcribe" if heard else "text to translate"
            raise UserError(
                f"got no prompt, expected a {what}, try jaxmodels sample {run} --prompt {'FILE' if heard else 'TEXT'}"
            )
        if heard:
            _transcript(load_run(run, best=best), Path(prompt))
            return
    opened = load_run(run, best=best)
    tokenizer, _ = opened.tokenizer, opened.task  # an imported model may have none
    if tokenizer is None:
        raise UserError(f"got {run} without a tokenizer, expected a run that was trained on texts, try another run")
    model, params = opened.model, opened.params["model"]
    prompt = None if prompt is None else prompt.removeprefix("\ufeff")  # a byte order mark is not part of the text
    if cfg.task.answers == "translation":
        from jaxmodels.generate.translation import translated

        assert prompt is not None
        asked.say_what_no_search_follows(Path(run))
        _show(translated(opened, [prompt])[0])
        return
    if top_k is not None and top_k > (size := model.config.vocab_size):
        raise UserError(
            f"got --top-k {top_k}, expected at most the model's vocabulary of {size}, try it without --top-k"
        )
    prompt = opening(tokenizer) if prompt is None else prompt
    if tokens is None:
        taken = len(tokenizer.before) + len(tokenizer.encode(prompt))
        room = 200 if model.longest is None else model.longest - taken
        given["tokens"] = max(min(200, room), 1)
    penalty = asked.repetition_penalty(Path(run))
    given.setdefault("repetition_penalty", penalty)
    drawn_as = {} if temperature == 0 else {"temperature": 0.8, **asked.drawing(Path(run))}
    _show(continued(model, params, tokenizer, prompt, **{**drawn_as, **given}))


def _transcript(run: Run, file: Path) -> None:
    from jaxmodels.data.sounds import Unreadable
    from jaxmodels.generate.speech import listener, recognizer

    try:
        heard = listener(run)(file.read_bytes())
    except OSError as error:
        raise UserError(f"got {file}, which cannot be read ({error.strerror}), expected a sound") from error
    except (Unreadable, UserError) as error:
        raise UserError(f"got {file}, which {error}") from error
    (answer,) = recognizer(run)([heard])
    if "error" in answer:
        raise UserError(f"got {run.directory}, expected a model that transcribes; {answer['error']}")
    _show(answer["transcript"])


def _place(usual: Path, out: Path | None) -> Path:
    """Return the file to write: the usual one, or another whose ending says what it is."""
    if out is None:
        return usual
    if out.suffix.lower() not in ("", usual.suffix):
        kind = usual.suffix[1:].upper()
        raise UserError(f"got --out {out}, expected a name for a {kind}, try --out {out.with_suffix(usual.suffix)}")
    check_place(out, "--out")
    return out


def _sound(run: Run, prompt: str | None, seconds: float, out: Path | None, given: dict[str, Any]) -> None:
    from jaxmodels.data.waves import wav
    from jaxmodels.generate.sounds import conditions_of, draw_sounds

    path = _place(run.directory / "sample.wav", out)
    samples, rate = draw_sounds(run, conditions_of(run, prompt), seconds=seconds, **given)
    path.write_bytes(wav(samples[0], rate))
    print(f"{path}: {len(samples[0]) / rate:.1f} seconds at {rate:,} samples a second")


def _pictures(run: Run, prompt: str | None, count: int, seed: int, out: Path | None, changed: dict[str, Any]) -> None:
    """Draw pictures to a PNG, with the task's fields changed where that is asked for."""
    from jaxmodels.generate.pictures import draw, sheet

    path, task = _place(run.directory / "sample.png", out), run.config.task
    for name in (changed := {name: value for name, value in changed.items() if value is not None}):
        if not hasattr(task, name):
            flag = "--steps" if name == "sample_steps" else "--guidance"
            raise UserError(f"got {flag} for a run of {task.kind}, whose pictures need none, try it without")
    run = replace(run, config=replace(run.config, task=replace(task, **changed)))
    images = draw(run, prompt, count, seed)
    sheet(images).save(path, "png")
    height, width = images.shape[1:3]
    print(printable(f"{path}: {count} pictures of {width}×{height}" + (f" of {prompt}" if prompt else "")))


def _show(text: str) -> None:
    """Print a text unchanged to a file or a pipe, and without control characters to a terminal."""
    print(printable(text) if sys.stdout.isatty() else text)
