"""How a sample is drawn, as plain tensor code: guidance now, integrators to come. No ComfyUI in here."""
