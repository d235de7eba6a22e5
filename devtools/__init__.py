"""Development tools: the environment, loading the checkout, driving a real ComfyUI. Never imported by the pack."""
