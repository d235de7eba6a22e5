"""Development tools: the environment, loading the checkout, running and driving a real ComfyUI. Never imported by the pack."""
