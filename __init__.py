"""ComfyUI-Tidetable: noise processes, schedules, guidance and LoRA training for diffusion models, on the same terms.

Importing this package loads neither torch nor ComfyUI: the host asks for the nodes through `comfy_entrypoint`, and the
pure folders (schedules, samplers, training) work without it.
"""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """ComfyUI calls this once after import; returns the extension that lists the nodes."""
    from comfy_api.latest import ComfyExtension

    from .nodes import NODES, serve_curves, serve_folders

    serve_curves(NODES)
    serve_folders()

    class TidetableExtension(ComfyExtension):
        async def get_node_list(self):
            return NODES

    return TidetableExtension()
