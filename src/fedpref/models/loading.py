"""Models that a run exported, as models of transformers that generate."""

from __future__ import annotations

import warnings
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedpref.data.whole_models import one_at_a_time
from fedpref.errors import UserError, reason
from fedpref.models.adapter_files import scale_of
from fedpref.models.generation import refuse_filled
from fedpref.models.language import LanguageModel
from fedpref.models.own_parts import FILE, OWN_ADAPTER, OwnHead
from fedpref.models.texts import Texts
from fedpref.models.trial import Limits
from fedpref.numerics import trees
from fedpref.numerics.trees import is_down

COLDEST = 1e-6  # a temperature that is as good as none


@one_at_a_time
def load_model(folder: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Load what a run exported.

    `generate` and the forward pass are transformers' own. With a reward head,
    `get_output_embeddings().reward` gives the explicit rewards of last hidden states.

    Args:
        folder: A run's `adapter` folder, or a client's.
        trust_remote_code: Run the code that comes with the base model, as transformers has it.

    Returns:
        A PEFT model, with the client's own head and bottleneck where it has them.

    Raises:
        UserError: There is no exported adapter there, or it is damaged, or its base is gone.
    """
    import transformers
    from peft import AutoPeftModelForCausalLM

    transformers.utils.logging.disable_progress_bar()
    if not (Path(folder) / "adapter_model.safetensors").is_file():
        raise UserError(
            f"{folder}: there is no exported adapter here. Give RUN/adapter, or RUN/clients/NAME "
            "of a finished run."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of PEFT's use of transformers
            model = AutoPeftModelForCausalLM.from_pretrained(
                str(folder), trust_remote_code=trust_remote_code
            ).eval()
    # whatever PEFT and transformers make of a folder that is damaged
    except Exception as error:
        raise UserError(
            f"{folder}: the exported model cannot be loaded, from its files and those of its base "
            f"model: {type(error).__name__}: {reason(error, whole=True)}"
        ) from error
    if (Path(folder) / FILE).exists():
        model.get_base_model().set_output_embeddings(
            OwnHead(model.get_output_embeddings(), trees.load(Path(folder) / FILE))
        )
    return model


def exported_parameters(language: LanguageModel, folder: Path) -> dict[str, Tensor]:
    """Return what `LanguageModel.export` has written, as the model takes it.

    Args:
        language: The model, with the adapter's settings that the folder was exported with.
        folder: A run's `adapter` folder, or a client's.
    """
    adapter, config = trees.load(folder / "adapter_model.safetensors"), language.model.peft_config
    merged, rank, scale = language.backbone.merged, 0, 1.0
    if merged:  # behind the merged adapter, with the scale in its factors
        rank = max(tensor.shape[0] for name, tensor in merged.items() if is_down(name))
        scale = scale_of(config["default"])
    parameters: dict[str, Tensor] = {}
    for name in language.parameter_names:
        factor, is_first = adapter[name], is_down(name)
        learned = factor[rank:] if is_first else factor[:, rank:] / scale
        shared, *own = learned.split(config["default"].r, 0 if is_first else 1)
        parameters[name] = shared
        for second in own:  # a client's second adapter, beside the first
            parameters[OWN_ADAPTER + name] = second
    if (folder / FILE).exists():
        parameters |= trees.load(folder / FILE)
    return parameters


def generate(
    folder: str | Path,
    prompt: str,
    *,
    chat: bool,
    max_new_tokens: int = 128,
    temperature: float | None = None,
    seed: int = 0,
    template_date: str | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Return an answer, sampled from an exported model.

    Args:
        folder: A run's `adapter` folder, or a client's.
        prompt: The prompt.
        chat: Lay it out as a user's turn by the chat template; otherwise it is taken as it is.
        max_new_tokens: Length of the answer at most.
        temperature: Of plain sampling; 0 always takes the likeliest token. By default the model's
            own generation config decides, with its top-p and the like.
        seed: Of the sampling.
        template_date: The day that chat templates write as today's, as 2024-07-26; by default
            today.
        trust_remote_code: Run the code that comes with the base model, as transformers has it.

    Raises:
        UserError: There is no model there, or no chat template where one is asked for, or the
            prompt leaves no room for an answer.
    """
    import transformers
    from transformers import AutoTokenizer

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    model = load_model(folder, trust_remote_code=trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:
        raise UserError(f"{folder}: the tokenizer cannot be loaded: {error!s:.200}") from error
    if chat and not tokenizer.chat_template:
        raise UserError(
            f"{folder}: the tokenizer has no chat template. Give the prompt as plain text, with "
            "--plain."
        )
    # the tokens that a prompt has in training, and the ends of answers there
    texts = Texts(tokenizer, model, template_date or date.today().isoformat())
    tokens, _ = (
        texts.chat([{"role": "user", "content": prompt}], []) if chat else texts.plain(prompt, [])
    )
    ids, limits = torch.tensor([tokens]), Limits.of(model)
    refuse_filled(limits, [tokens])
    if limits.most is not None:
        max_new_tokens = min(max_new_tokens, limits.most - len(tokens))
    sampling: dict[str, Any] = {}
    if temperature is not None:
        # nothing of the model's own sampling beside it
        model.generation_config = transformers.GenerationConfig()
        draws = temperature > COLDEST  # below it the likeliest token is all that is ever drawn
        sampling = {"do_sample": draws, "top_k": 0, "top_p": 1.0}
        if draws:
            sampling["temperature"] = temperature
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            eos_token_id=texts.stops or None,
            pad_token_id=texts.end,
            **sampling,
        )
    return str(tokenizer.decode(output[0, len(tokens) :], skip_special_tokens=True)).strip()
