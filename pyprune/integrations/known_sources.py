"""Functions of other tools that our kernels were tested in the place of.

By tool and function the fingerprints (`patching.fingerprint`) of the sources that were read and run. A release is taken
if all of them are known, whatever its number. `python tests/support/integration_checks.py TOOL --fingerprints` prints
those of the installed one.
"""

_GPTQ = "gptqmodel.quantization.gptq.GPTQ"
_HELPERS = "llmcompressor.modifiers.gptq.helpers"
_SPARSIFY = "llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify"
_SPARSEGPT = "llmcompressor.modifiers.pruning.sparsegpt.base.SparseGPTModifier"

KNOWN_SOURCES: dict[str, dict[str, frozenset[str]]] = {
    # 0.14.0, 0.14.0.1
    "llm-compressor": {
        f"{_HELPERS}.make_empty_hessian": frozenset({"1480369a91ad5e8b"}),
        f"{_HELPERS}.accumulate_hessian": frozenset({"60f14467a6a8a191"}),
        f"{_HELPERS}.prepare_batch": frozenset({"f30066d359c70805"}),
        f"{_HELPERS}.factorize_hessian": frozenset({"dde3c67f7b3a0693"}),
        f"{_SPARSIFY}.make_empty_hessian": frozenset({"f933e94dff0e3460"}),
        f"{_SPARSIFY}.accumulate_hessian": frozenset({"7172219f7b1e79a0"}),
        f"{_SPARSIFY}.sparsify_weight": frozenset({"3788e5c8d74b1a89"}),
        f"{_SPARSEGPT}._maybe_onload_hessian": frozenset({"1f8533bc395f92ed"}),
    },
    # 7.6.0 and 7.7.0 have the same ones; 7.7.0 was run.
    "gptqmodel": {
        f"{_GPTQ}.add_batch": frozenset({"bfecd67084d7d7a4"}),
        f"{_GPTQ}.materialize_global_hessian": frozenset({"158633fc28d48a06"}),
        f"{_GPTQ}.hessian_inverse": frozenset({"9419f511494cdf79"}),
        f"{_GPTQ}.process_batch": frozenset({"60ffdaa906541944"}),
        f"{_GPTQ}._wait_partial_ready": frozenset({"e043bbe198553d83"}),
        f"{_GPTQ}._record_partial_ready": frozenset({"4a9aa9994931abdf"}),
        f"{_GPTQ}._record_hessian_ready": frozenset({"039de45f74cda88a"}),
    },
}
