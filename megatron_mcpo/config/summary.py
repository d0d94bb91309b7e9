"""Describe a run in numbers before it starts: layout, sizes of a step, warnings."""

from megatron_mcpo.config.config import Config
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import ModelConfig, fast_dtype


def empty_terms(config: Config) -> list[str]:
    """Return one line for each term of the objective that cannot have pairs with this configuration."""
    if config.contrastive.cross_domain_weight == 0 or len(config.domain) > 1:
        return []
    return [
        f"contrastive.cross_domain_weight = {config.contrastive.cross_domain_weight}: cross-domain sharing needs at "
        "least two domains; with one the term is 0"
    ]


def slow_arithmetic(config: Config) -> list[str]:
    """Return a warning if this machine is slow in the data type of the configuration."""
    if config.model.dtype in (fast_dtype(), "fp32"):
        return []
    return [
        f"WARNING: model.dtype = {config.model.dtype!r}: this CPU has no AVX-512 and samples more slowly in bf16 than "
        "in fp32. Set it to 'auto' or 'fp32', unless memory is short."
    ]


def arithmetic(config: Config, layout: Layout, model: ModelConfig) -> str:
    """Return lines for people to read: the model, the layout, the engines, the sizes of a step, the method."""
    batch = config.batch
    fewest, most = min(config.group_sizes), max(config.group_sizes)
    rollouts = batch.prompts * most
    engine = config.engine
    engines, where = layout.world_size // engine.tensor_parallel, "rank(s)"
    if engine.servers:
        engines, where = len(engine.servers), "worker(s) in a server of its own"
    samples, bound = (f"{most} samples", "") if fewest == most else (f"{fewest} to {most} samples", "up to ")
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    mixture = f"{model.experts.per_token} of {model.experts.count} experts per token, " if model.experts else ""
    method = "MCPO" if config.contrastive.enabled else "GRPO (both contrastive weights are 0)"
    return "\n".join(
        [
            f"model    {config.model.path}: {model.family}, {model.num_layers} layers, hidden {model.hidden_size}, "
            f"{model.num_heads}/{model.num_kv_heads} heads, {mixture}vocabulary {model.vocab_size}, "
            f"{config.model.dtype}",
            f"layout   {layout.world_size} rank(s) = {layout}",
            f"engine   {engines} x vLLM on {engine.tensor_parallel} {where}, weights pushed after every step",
            f"step     {batch.prompts} prompts x {samples} = {bound}{rollouts} rollouts, at most "
            f"{rollouts * longest} tokens, {batch.minibatches} optimizer step(s)",
            f"rank     about {-(-rollouts // layout.data)} rollouts in micro-batches of at most "
            f"{batch.micro_batch_tokens} tokens",
            f"limits   prompts of up to {config.rollout.max_prompt_tokens} tokens, responses of up to "
            f"{config.rollout.max_response_tokens} (rollout.max_response_tokens)",
            f"run      {method}, {config.run.steps} steps, domains {', '.join(config.domain_names)}, "
            f"seed {config.run.seed}",
        ]
    )
