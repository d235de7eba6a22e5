"""Before and after: everything about a MODEL that a node must not change."""

import hashlib

import torch


def fingerprint(patcher) -> dict:
    """Weights, patches, options, hooks and instance attributes of a MODEL, as comparable values."""
    model = patcher.model
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode() + _bytes(value))
    return {
        "weights": digest.hexdigest(),
        "inference": sum(p.is_inference() for p in model.parameters()),
        "requires_grad": sum(p.requires_grad for p in model.parameters()),
        "gradients": sum(p.grad is not None for p in model.parameters()),
        "hooks": sum(
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()
        ),
        "forwards": sum("forward" in vars(m) for m in model.modules()),
        "patches": sorted(patcher.patches),
        "object_patches": sorted(patcher.object_patches),
        "model_options": repr(sorted(patcher.model_options))
        + repr(sorted(patcher.model_options["transformer_options"])),
    }


def _bytes(value) -> bytes:
    """Of tensors that are made of others: those of all of them."""
    if hasattr(value, "__tensor_flatten__"):
        return b"".join(_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    plain = value.detach().as_subclass(torch.Tensor).cpu().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def inference_copy(patcher):
    """The MODEL with every weight replaced by an inference tensor, as ComfyUI's own loaders hand it over."""
    with torch.inference_mode():
        for module in patcher.model.modules():
            for table, wrap in ((module._parameters, torch.nn.Parameter), (module._buffers, lambda t: t)):
                for name, tensor in table.items():
                    if tensor is not None:
                        table[name] = wrap(tensor.clone())
    return patcher
