"""README.md of a model on the Hugging Face Hub."""

from cm_jax.checkpoints.model_config import ModelConfig

_CARD = """---
{metadata}
---

# {title}

{kind} in JAX, written by cm_jax.

| Property | Value |
|---|---|
{properties}

## Sampling
{snippets}"""

_CM_JAX = """import cm_jax

model = cm_jax.load("{repo_id}")
images = model.sample(0, 16{steps})  # seed 0: float32 [16, {shape}] in [-1, 1]
cm_jax.save_images(images, "samples.png")"""

_DIFFUSERS = """from diffusers import ConsistencyModelPipeline

pipeline = ConsistencyModelPipeline.from_pretrained("{repo_id}")
image = pipeline({arguments}).images[0]"""


def model_card(repo_id: str, config: ModelConfig, parameters: int, *, pipeline: bool, license: str = "") -> str:
    """The card: architecture, conditioning, noise levels, and code that samples from the model.

    parameters: their number. pipeline: whether the repository holds a ConsistencyModelPipeline of diffusers. license:
    an identifier of the Hub, such as apache-2.0; empty to leave the field out.
    """
    from huggingface_hub import ModelCardData

    metadata = ModelCardData(
        license=license or None,
        library_name="diffusers" if pipeline else "cm_jax",
        pipeline_tag="unconditional-image-generation",
        tags=["consistency-model" if config.distilled else "diffusion", "cm_jax"],
    )
    snippets = {"cm_jax": _cm_jax(repo_id, config)} | ({"diffusers": _diffusers(repo_id, config)} if pipeline else {})
    return _CARD.format(
        metadata=metadata.to_yaml(),
        title=repo_id.partition("/")[2],
        kind="Consistency model" if config.distilled else "EDM denoiser",
        properties="\n".join(f"| {name} | {value} |" for name, value in _properties(config, parameters).items()),
        snippets="\n".join(f"With {name}:\n\n```python\n{code}\n```\n" for name, code in snippets.items()),
    )


def _properties(config: ModelConfig, parameters: int) -> dict[str, str]:
    network, schedule, names = config.network, config.schedule, config.class_names
    height, width, channels = network.image_shape
    shown = [*names[:10], "..."] if len(names) > 10 else names
    classes = f"{network.classes:,} classes" if network.classes else "unconditional"
    tuned = [f"{','.join(map(str, steps))} ({len(steps)} steps)" for steps in config.tuned_timesteps]
    return {
        "Architecture": f"{type(network).__name__}, {parameters:,} parameters",
        "Images": f"{height} x {width} pixels, {channels} channels",
        "Conditioning": classes + (f": {'; '.join(shown)}".replace("|", "\\|") if names else ""),
        "Preconditioning": type(config.preconditioning).__name__,
        "Noise levels": f"sigma {schedule.sigma_min:g} to {schedule.sigma_max:g}, rho {schedule.rho:g}, "
        f"N = {config.num_levels}",
        "Tuned timesteps": "; ".join(tuned) or "none",
    }


def _cm_jax(repo_id: str, config: ModelConfig) -> str:
    shape = ", ".join(map(str, config.network.image_shape))
    steps = f", steps={len(config.tuned_timesteps[0])}" if config.tuned_timesteps else ""
    return _CM_JAX.format(repo_id=repo_id, shape=shape, steps=steps)


def _diffusers(repo_id: str, config: ModelConfig) -> str:
    tuned = config.tuned_timesteps
    arguments = f"num_inference_steps=None, timesteps={list(tuned[0])}" if tuned else "num_inference_steps=1"
    return _DIFFUSERS.format(
        repo_id=repo_id, arguments=arguments + (", class_labels=0" if config.network.classes else "")
    )
