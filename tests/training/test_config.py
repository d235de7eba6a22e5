import pytest

from tidetable.training.config import LoRAConfig, TrainConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0), ("batch_size", 0), ("learning_rate", 0.0), ("learning_rate", float("nan")),
        ("learning_rate", float("inf")), ("learning_rate", 1e6),
        ("warmup_steps", -1), ("max_grad_norm", -0.1), ("max_grad_norm", float("nan")), ("ema_decay", 1.0),
        ("caption_dropout", 1.5), ("caption_dropout", float("nan")), ("logit_std", 0.0), ("logit_mean", float("inf")),
    ],
)  # fmt: skip
def test_a_bad_number_is_refused_by_name_and_value(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}, but it must be "):
        TrainConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"), [("rank", 0), ("rank", 513), ("lora_alpha", 0.0), ("lora_alpha", float("nan"))]
)
def test_a_bad_adapter_is_refused_by_name_and_value(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}, but it must be "):
        LoRAConfig(**{field: value})
