"""Keeping a training run safe: the settings of Train LoRA's input `run`."""

from comfy_api.latest import io

from ..runtime.training_run import GuardConfig, RunConfig, run_config


_RUN, _GUARD = RunConfig(), GuardConfig()
RunSettings = io.Custom("TIDETABLE_TRAINING_RUN")


class TrainingRun(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Tidetable_TrainingRun",
            display_name="Training Run",
            category="Tidetable/training",
            description=(
                "Keeps a training run safe: checkpoints from which a cancelled or crashed run goes on bit for bit, a "
                "guard against loss spikes, and a log of every step."
            ),
            inputs=[
                io.Int.Input(
                    "checkpoint_every_steps",
                    default=_RUN.checkpoint_every_steps,
                    min=0,
                    max=1_000_000,
                    tooltip="Steps between two checkpoints. 0 is none by steps; 50 to 500 is typical.",
                ),
                io.Float.Input(
                    "checkpoint_every_minutes",
                    default=_RUN.checkpoint_every_minutes,
                    min=0.0,
                    max=1440.0,
                    step=0.5,
                    tooltip=(
                        "Minutes after which a checkpoint is due in any case. 0 is none by time; 5 to 30 is typical."
                    ),
                ),
                io.Int.Input(
                    "keep",
                    default=_RUN.keep,
                    min=1,
                    max=100,
                    tooltip="Checkpoints that stay, the newest. 0 is not possible; 2 to 5 is typical.",
                ),
                io.String.Input(
                    "resume",
                    default=_RUN.resume,
                    tooltip=(
                        "'auto' goes on with the run of the same model, data and settings where there is one, 'off' "
                        "starts anew, the name of a run in output/tidetable/runs goes on with that one."
                    ),
                ),
                io.Boolean.Input(
                    "resume_anyway",
                    default=_RUN.resume_anyway,
                    tooltip=(
                        "Go on with a named run although model, data or settings are no longer those it was made with."
                        " Off refuses and lists what changed."
                    ),
                ),
                io.Boolean.Input(
                    "guard",
                    default=_RUN.guard is not None,
                    tooltip=(
                        "Leave out the update of a step whose loss or gradient spikes; after two in a row, put the "
                        "last good weights back. Off leaves out only what is not finite."
                    ),
                ),
                io.Float.Input(
                    "guard_threshold",
                    default=_GUARD.threshold,
                    min=1.0,
                    max=100.0,
                    step=0.5,
                    tooltip=(
                        "Robust standard deviations of ln(loss) or ln(gradient norm) above the median of the last 100 "
                        "healthy steps that make a spike. 0 is not possible; 6 to 12 is typical."
                    ),
                ),
                io.Int.Input(
                    "snapshot_every",
                    default=_GUARD.snapshot_every,
                    min=1,
                    max=100_000,
                    tooltip="Steps between two snapshots in memory. 0 is not possible; 20 to 200 is typical.",
                ),
                io.Float.Input(
                    "rate_factor",
                    default=_GUARD.rate_factor,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "The learning rate is multiplied by this whenever the weights are put back. 0 is not possible, "
                        "1 leaves it; 0.5 to 1 is typical."
                    ),
                ),
                io.Int.Input(
                    "max_restores",
                    default=_GUARD.max_restores,
                    min=1,
                    max=1000,
                    tooltip=(
                        "The run stops, with everything saved, when the weights would be put back more often than this."
                        " 0 is not possible; 3 to 10 is typical."
                    ),
                ),
                io.String.Input(
                    "log",
                    default=_RUN.log,
                    tooltip=(
                        "File under the output folder that gets a JSON line for every step, such as "
                        "tidetable/run.jsonl. Empty is none."
                    ),
                ),
                io.Boolean.Input(
                    "tensorboard",
                    default=_RUN.tensorboard,
                    tooltip=(
                        "The same numbers for TensorBoard, in tidetable/tensorboard in the output folder. Off is none; "
                        "on needs the package tensorboard, which you install yourself."
                    ),
                ),
            ],
            outputs=[RunSettings.Output(display_name="run", tooltip="For the input 'run' of Train LoRA.")],
        )

    @classmethod
    def execute(cls, **settings) -> io.NodeOutput:
        return io.NodeOutput(run_config(**settings))


NODES: list[type[io.ComfyNode]] = [TrainingRun]
