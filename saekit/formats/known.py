"""The formats saekit reads, how each is told from the others, and reading whichever it is."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from saekit.errors import FileError, SaekitError
from saekit.formats import dictionary_learning, gemma_scope, llama_scope, openai, saelens, single_files, sparsify
from saekit.formats.files import Files
from saekit.formats.weights import Weights, with_input_scale


@dataclass(frozen=True, slots=True)
class Format:
    """A way in which SAEs are published.

    Attributes:
        recognises: by names of files, keys and tensors alone.
        read: what the files mean.
    """

    name: str
    recognises: Callable[[Files], bool]
    read: Callable[[Files], Weights]


# the first that recognises the files reads them: the more particular ones come first
FORMATS = (
    Format("llama-scope", llama_scope.recognises, llama_scope.read),
    Format("saelens", saelens.recognises, saelens.read),
    Format("sparsify", sparsify.recognises, sparsify.read),
    Format("gemma-scope", gemma_scope.recognises, gemma_scope.read),
    Format("openai", openai.recognises, openai.read),
    Format("goodfire", single_files.is_goodfire, single_files.read_goodfire),
    Format("qwen-scope", single_files.is_qwen_scope, single_files.read_qwen_scope),
    Format("circuit-tracer", single_files.is_circuit_tracer, single_files.read_circuit_tracer),
    # last: it also takes files that have no config; DeepSeek-R1's distilled ones look like its AutoEncoderNew
    Format("dictionary_learning", dictionary_learning.recognises, dictionary_learning.read),
)


def identify(files: Files) -> Format:
    """The format of these files.

    Raises:
        FileError: none that saekit knows; the message says what is in them.
    """
    found = next((known for known in FORMATS if known.recognises(files)), None)
    if found is None:
        raise FileError(
            f"{files.weights} is in no format saekit knows ({', '.join(known.name for known in FORMATS)}): its tensors "
            f"are {', '.join(list(files.tensors)[:8])}; the config that belongs beside it may be missing"
        )
    return found


def read(files: Files) -> Weights:
    """What the files mean, with any scale of the inputs still in `input_scale`.

    Raises:
        FileError: an unknown format, something the files lack, or tensors that do not fit together.
    """
    known = identify(files)
    try:
        return known.read(files)
    except FileError:
        raise
    except (SaekitError, ValueError, IndexError, RuntimeError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileError(f"{files.weights} was taken for {known.name}, but {reason}; copy the SAE again") from error


def for_raw_inputs(weights: Weights, path: Path, *, input_scale: float | None = None) -> Weights:
    """The same SAE with the scale of its inputs folded in.

    Args:
        input_scale: what inputs are multiplied with before encoding; wins over what the files say.

    Raises:
        FileError: if the files need a scale and say none, and neither does the caller.
    """
    scale = weights.input_scale if input_scale is None else input_scale
    if scale is None:
        raise FileError(
            f"the SAE in {path} was trained on scaled inputs, but its files do not say by how much; pass input_scale: "
            "norm_scaling_factor in SAELens' list of SAEs, or sqrt(d_in) / the mean norm of its activations"
        )
    folded = weights if scale == 1 else with_input_scale(weights, scale)
    return replace(folded, input_scale=1.0)
