"""The node that writes a training run for train.py."""

from comfy_api.latest import io

from ..runtime.job import export_job
from .training import TrainLoRA


NOT_IN_A_JOB = ("latents", "positive", "empty", "preview", "text_encoder")


class ExportJob(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        inputs = [x for x in TrainLoRA.define_schema().inputs if x.id not in NOT_IN_A_JOB]
        for entry in inputs:
            entry.optional = entry.optional and entry.id != "dataset"
        return io.Schema(
            node_id="Tidetable_ExportJob",
            display_name="Export Training Job",
            category="Tidetable/training",
            description=(
                "Writes what Train LoRA would do as a folder that train.py of this pack runs without the page: on this "
                "machine, on all its GPUs, or on several machines with torchrun."
            ),
            is_output_node=True,
            is_input_list=True,
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            inputs=[
                *inputs,
                io.String.Input(
                    "job_name",
                    default="lora",
                    tooltip="Folder under output/tidetable/jobs; a job of the same name is replaced. Cannot be empty.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="tidetable/lora",
                    tooltip="Name of the LoRA inside the loras folder, as in Save LoRA. Cannot be empty.",
                ),
                io.Boolean.Input(
                    "shard_base",
                    default=False,
                    tooltip=(
                        "On: of several processes each holds its share of the model's weights only (FSDP2), and gets "
                        "the others' for the moment that it needs them. Off: each holds all of them. On where the "
                        "model is most of the memory; one process makes no difference."
                    ),
                ),
            ],
            outputs=[io.String.Output(display_name="job_file", tooltip="Path of the job.toml.")],
        )

    @classmethod
    def execute(cls, model, dataset, job_name, **settings) -> io.NodeOutput:
        del model  # its graph is exported, not its weights
        single = {name: value[0] for name, value in settings.items() if value and value[0] is not None}
        path = export_job(job_name[0], cls.hidden.prompt, cls.hidden.unique_id, dataset[0], single)
        return io.NodeOutput(str(path), ui={"text": (str(path),)})


NODES: list[type[io.ComfyNode]] = [ExportJob]
