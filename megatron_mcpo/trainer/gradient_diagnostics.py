"""Do the terms of the objective help or hinder each other? Measured on their gradients, every few steps.

Shape legend: see megatron_mcpo.types.
"""

from torch import Tensor

from megatron_mcpo.algo.contrastive import contrastive
from megatron_mcpo.mcore.policy import Policy
from megatron_mcpo.trainer.objective import Contrasted, Objective, Scored


def term_gradients(
    objective: Objective, policy: Policy, scored: Scored, advantages_M: Tensor, contrasted: Contrasted
) -> dict[str, float]:
    """Of each contrastive term with its weight, for TERM share and consolidate:

    gradient/z_TERM      norm of its gradient on the representations
    gradient/trunk_TERM  norm of its gradient on the model's weights, the head left out
    gradient/cos_TERM    cosine of that to the gradient of the policy term (KL included): below 0 they work against
                         each other. Left out where one of them is 0.
    and gradient/trunk_policy. A forward and backward pass for the policy term and each term that has a weight; this
    rank's share of two gradients is held meanwhile, in fp32. No parameter moves; all ranks together.
    """
    settings = objective.config.contrastive
    own = policy.trunk_gradient(scored.batch, objective.loss(scored, advantages_M, None))
    own_norm = policy.dot(own, own) ** 0.5
    figures = {"gradient/trunk_policy": own_norm}
    weights = {"cross_domain": settings.cross_domain_weight, "in_domain": settings.in_domain_weight}
    for term, other in (("cross_domain", "in_domain_weight"), ("in_domain", "cross_domain_weight")):
        if weights[term] == 0:
            continue
        alone = contrastive(
            contrasted.z_MD, scored.batch.labels.to(contrasted.z_MD.device), settings.model_copy(update={other: 0.0})
        )
        gradient = policy.trunk_gradient(scored.batch, objective.contrastive_loss(scored, alone))
        norm = policy.dot(gradient, gradient) ** 0.5
        figures |= {f"gradient/z_{term}": alone.grad_z_MD.norm().item(), f"gradient/trunk_{term}": norm}
        if own_norm and norm:
            figures[f"gradient/cos_{term}"] = policy.dot(own, gradient) / (own_norm * norm)
    return figures
