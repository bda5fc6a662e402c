"""The resume certificate of a checkpoint, taken again by one process that trains nothing."""

from __future__ import annotations

from pathlib import Path

from moetrain.checkpoint.certificate import differences
from moetrain.checkpoint.store import Manifest
from moetrain.config.schema import RunConfig
from moetrain.data.build import make_batches, open_corpus
from moetrain.hub.generate import best_device, read_model
from moetrain.train.evaluate import certify, probe_batches
from moetrain.train.loop import step_seed


def hold(directory: Path, manifest: Manifest, run: RunConfig, *, run_dir: Path) -> list[str]:
    """What of a checkpoint's certificate does not hold, as a run that went on from it would find.

    One process holds the whole model in float32 and sees the probe as one rank of many would, so values agree to the
    tolerances that hold between layouts. The next batch of a streamed text is not known without its producer, and is
    taken as it was.

    Args:
        directory: of the checkpoint, which fits its settings.
        manifest: with a certificate.
        run: the settings in it.
        run_dir: where a streamed text has its beginning.

    Raises:
        DataError: the token files of the run are not here, or not whole.
    """
    saved = manifest.certificate
    assert saved is not None
    corpus, step = open_corpus(run, run_dir), manifest.step
    now = certify(
        read_model(directory, run.model, device=best_device()),
        probe_batches(corpus.held_out().values(), sequence_length=run.sequence_length),
        packing=corpus.packing(run.data),
        next_batch=saved.next_batch if run.data.stream else make_batches(run, corpus).fingerprint(step),
        next_seed=step_seed(run.seed, step, rank=0),
        device=best_device(),
        layout={"dtype": "fp32"},
    )
    return differences(saved, now, exact=False)
