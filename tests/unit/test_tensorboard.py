"""What TensorBoard shows of a run that was killed and went on."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_capgap.runtime.logging import RunLogger


def test_steps_that_were_taken_again_are_shown_once(tmp_path: Path) -> None:
    for steps, loss in ((range(1, 5), 1.0), (range(3, 6), 2.0)):  # killed after step 4, its checkpoint was of step 2
        log = RunLogger(tmp_path, True, True)
        for step in steps:
            log.record({"step": step, "loss": loss})
        log.close()
    shown = EventAccumulator(str(tmp_path / "tensorboard"))
    shown.Reload()
    assert [(event.step, event.value) for event in shown.Scalars("loss")] == [
        (1, 1.0),
        (2, 1.0),
        (3, 2.0),
        (4, 2.0),
        (5, 2.0),
    ]
