"""What a diffusion model is told about noise, as plain mathematics: processes, predictions, shifts, families, spacings.

Pure code: torch and the standard library, float64 unless handed something else, no ComfyUI. Import the submodules.
"""
