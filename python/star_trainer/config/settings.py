"""Every setting of a run, typed and checked before any weights load."""

from __future__ import annotations

import os.path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Method = Literal["star", "uniform", "uniform_position", "shuffled", "inverted", "oracle", "r0", "r0_plus"]
# Differentiable rewards, back-propagated through the sampler; all others are policy gradients.
REWARD_GRADIENT_METHODS = ("r0", "r0_plus")
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
# No shell expands ~ behind an equals sign; what is no path does not begin with it.
Place = Annotated[str, AfterValidator(os.path.expanduser)]


def _check_address(address: str) -> str:
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or any(map(str.isspace, address)):
        raise ValueError("expected an address that begins with http:// or https://")
    return address


Address = Annotated[str, AfterValidator(_check_address)]


def _check_sides(value: Any) -> Any:
    """Before the types are looked at: a union's own messages would be one for each of its members."""
    sides = value if isinstance(value, (list, tuple)) else [value, value]
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError("expected pixels of a side, or [height, width]")
    return value


def _check_layer(value: Any) -> Any:
    """Likewise."""
    if not isinstance(value, str) and not (type(value) is int and value >= 0):
        raise ValueError("expected a number of at least 0, or a name")
    return value


Layer = Annotated[int | str, BeforeValidator(_check_layer)]
Resolution = Annotated[int | tuple[int, int], BeforeValidator(_check_sides)]


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


def _as_trackers(value: Any) -> Any:
    """A name, or a list of names, as trackers without options."""
    names = [value] if isinstance(value, str) else value
    return {name: {} for name in names} if isinstance(names, list) else names


class Run(Section):
    """Where the run lives."""

    folder: Place = Field("runs/{preset}", description="output folder; {preset}, {method} and {seed} are filled in")
    seed: int = Field(0, ge=0, lt=1 << 63, description="seed of every random number of the run")
    resume: bool = Field(True, description="go on from the newest whole checkpoint in the folder")
    progress: bool = Field(True, description="show a progress bar")
    trackers: Annotated[dict[str, dict[str, Any]], BeforeValidator(_as_trackers)] = Field(
        {"tensorboard": {}},
        description="where curves and images go: tensorboard, wandb or whatever else accelerate knows, as a name, a "
        "list, or with options of their own, such as '{wandb: {mode: offline}}'; [] for none",
    )
    project: str = Field("star_kernels", description="the project of trackers that have projects")


class Lora(Section):
    """Low-rank adapters, by peft."""

    rank: Positive = 16
    alpha: Positive = 32
    targets: list[str] | None = Field(
        None, min_length=1, description="linear layers that get an adapter, or null for those of the pipeline's family"
    )


class Model(Section):
    """The pipeline that is post-trained."""

    pipeline: Place = Field("tiny", description="'tiny' (comes with the package), a folder, or a name on a model hub")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the frozen weights, and of autocast")
    vae_dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="of the autoencoder, or null for that of the other weights"
    )
    tf32: bool = Field(False, description="let a GPU round what goes into float32 matrix products to TF32")
    max_sequence_length: Positive = Field(
        256,
        description="positions of the text, where the pipeline leaves a choice (T5's, Qwen's); the tiny pipeline was "
        "trained with 16",
    )
    resolution: Resolution | None = Field(
        None, description="pixels of an image's sides, one number or [height, width], or null for the pipeline's own"
    )
    levels: Literal["pipeline", "even"] = Field(
        "pipeline",
        description="noise levels of the steps: those that the pipeline's scheduler chooses, or, for few steps, 1 to "
        "1/steps evenly before its shift (the pipeline's argument sigmas)",
    )
    lora: Lora | None = Field(Lora(), description="adapters, or null to train all weights of the transformer")
    adapter: Place | None = Field(
        None,
        description="LoRA weights to start from (diffusers' or peft's: a folder, a file or a name on a hub), with "
        "rank, alpha and layers of their own; base and KL stay those of the pipeline without them",
    )
    gradient_checkpointing: bool = False
    sharded: bool = Field(False, description="spread the transformer over the processes (FSDP) instead of copying it")
    embedding_cache: float = Field(8.0, gt=0.0, description="GiB of host memory for prompt embeddings, per process")

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of an image in pixels, or None for the pipeline's own."""
        return (self.resolution, self.resolution) if isinstance(self.resolution, int) else self.resolution

    @property
    def dtype_of_vae(self) -> str:
        """The name of the autoencoder's dtype."""
        return self.vae_dtype or self.dtype


class Prompts(Section):
    """What is drawn, and for which prompts it is measured."""

    source: Place = Field(
        "scenes", description="'scenes', or a file: .jsonl (prompt, units, metadata), .txt (a line each) or .tsv"
    )
    held_out: Place | None = Field(None, description="file of the held-out prompts, where source is a file")
    origin: str | None = Field(None, description="where to get the files, said when one is missing")


class Units(Section):
    """Which phrases of a prompt matter; ``units: rules`` is short for ``units: {source: rules}``."""

    source: Literal["file", "rules", "llm"] = Field(
        "file",
        description="file (as they stand beside the prompts), rules (English prompts alone), or llm (a chat model)",
    )
    cache: str | None = Field(
        "~/.cache/star_kernels/units.sqlite", description="file of what a chat model said, or null"
    )
    task: Literal["geneval", "ocr", "general"] = Field("general", description="what the chat model is told to look for")
    model: Place | None = Field(None, description="chat model: a folder, or its name on a hub or at the endpoint")
    endpoint: Address | None = Field(None, description="base address of an OpenAI-like API, or null for transformers")
    key_variable: str = Field("OPENAI_API_KEY", description="environment variable with the endpoint's key, if any")
    batch_size: Positive = Field(16, description="prompts per question")
    retries: int = Field(2, ge=0, description="further questions about an answer that cannot be used")
    timeout: float = Field(120.0, gt=0.0, description="seconds until a request to the endpoint is given up")
    max_new_tokens: Positive = Field(2048, description="length of an answer, a model's thoughts included")
    token_limit: Literal["auto", "max_tokens", "max_completion_tokens"] = Field(
        "auto", description="what the endpoint calls that length; auto is max_tokens until it asks for the other"
    )
    temperature: float | None = Field(0.0, ge=0.0, description="what is sent to the endpoint, or null for nothing")

    @model_validator(mode="before")
    @classmethod
    def _from_source(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value


class SdeWindow(Section):
    """Successive denoising steps that draw noise and are trained on; where they begin is drawn for every iteration."""

    size: Positive = Field(description="how many steps")
    range: tuple[Annotated[int, Field(ge=0)], Positive] = Field(
        description="first step that may be among them, and the first one after it that may not"
    )


class RolloutConfig(Section):
    """How samples are drawn for training."""

    prompts: Positive = Field(8, description="prompts per iteration, over all processes")
    samples: Positive = Field(8, description="samples per prompt: the size of a group")
    batch_size: Positive = Field(64, description="samples per forward pass")
    steps: Positive = Field(10, description="denoising steps; with r0 those of its generator, 4 if not said")
    sampler: Literal["flow_sde", "dance_sde", "cps", "ddim"] = Field(
        "flow_sde", description="ddim for models that predict noise, one of the others for those that predict velocity"
    )
    eta: float = Field(0.7, gt=0.0, description="noise level of the sampler")
    sde_steps: Positive | None = Field(
        None,
        description="how many of the first steps draw noise and are trained on, or null for all; the rest is Euler",
    )
    sde_window: SdeWindow | None = Field(
        None, description="in the place of sde_steps: steps in a row, at another place in every iteration"
    )
    shared_noise: bool = Field(False, description="start all samples of a group from the same noise, as DanceGRPO does")
    guidance_scale: float = Field(1.0, ge=1.0, description="classifier-free guidance; 1 is without")
    keep_on_host: bool = Field(False, description="keep samples in host memory between rollout and update")
    encode_ahead: Positive = Field(16, description="iterations whose prompts are encoded at a time")

    @property
    def noisy_steps(self) -> int:
        """How many steps of a trajectory draw noise (with cps, up to one less)."""
        return self.sde_window.size if self.sde_window else min(self.sde_steps or self.steps, self.steps)


class RewardModels(Section):
    """The models that rewards load: folders, or names on a model hub."""

    clip: Place = Field(
        "openai/clip-vit-large-patch14",
        description="of clip_score, and of geneval's colours; 'tiny' comes with the package and knows scenes",
    )
    pickscore: Place = Field(
        "yuvalkirstain/PickScore_v1", description="of pickscore; 'tiny' comes with the package and knows scenes"
    )
    pickscore_processor: Place = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    detector: Place = Field(
        "facebook/mask2former-swin-small-coco-instance", description="of geneval: instances of COCO's classes"
    )
    hps: Place | None = Field(None, description="of hps: the folder that `star-convert-reward hps` has written")
    image_reward: Place | None = Field(
        None, description="of image_reward: the folder that `star-convert-reward image_reward` has written"
    )
    aesthetic: Place | None = Field(
        None, description="of aesthetic: the folder that `star-convert-reward aesthetic` has written"
    )
    hps3: Place | None = Field(None, description="of hps3: the folder that `star-convert-reward hps3` has written")
    aesthetic_clip: Place = Field("openai/clip-vit-large-patch14", description="whose embeddings aesthetic rates")


def _as_addresses(value: Any) -> Any:
    return [] if value is None else _as_list(value)


def _check_addresses(addresses: list[str]) -> list[str]:
    return [_check_address(address) for address in addresses]


class RemoteReward(Section):
    """The reward server that the term ``remote`` asks."""

    url: Annotated[list[str], BeforeValidator(_as_addresses), AfterValidator(_check_addresses)] = Field(
        [], description="its address, such as http://localhost:8100, or a list of those of several, asked in turn"
    )
    format: Literal["png", "raw"] = Field("png", description="how images are sent")
    token_variable: str = Field("STAR_REWARD_TOKEN", description="environment variable with its token, if it wants one")
    batch_size: Positive = Field(64, description="images per request")
    timeout: float = Field(120.0, gt=0.0, description="seconds until a request is given up")
    retries: int = Field(5, ge=0, description="further attempts, with growing pauses, before it counts as dead")


class Judge(Section):
    """The vision-language model that the term ``vlm_judge`` asks."""

    endpoint: Address | None = Field(None, description="base address of an OpenAI-like API that takes images")
    model: str | None = Field(None, description="its name at the endpoint")
    template: Place = Field(
        "alignment", description="what it is asked: alignment, text, or a file with {prompt} (and {low}, {high}) in it"
    )
    range: tuple[float, float] = Field(
        (0.0, 10.0), description="lowest and highest number; the reward is 0 and 1 there"
    )
    key_variable: str = Field("OPENAI_API_KEY", description="environment variable with the endpoint's key, if any")
    at_once: Positive = Field(8, description="requests at a time; each shows one image")
    retries: int = Field(2, ge=0, description="further questions about an answer without a usable number")
    timeout: float = Field(120.0, gt=0.0, description="seconds until a request is given up")
    max_new_tokens: Positive = Field(512, description="length of an answer, a model's thoughts included")
    token_limit: Literal["auto", "max_tokens", "max_completion_tokens"] = Field(
        "auto", description="what the endpoint calls that length; auto is max_tokens until it asks for the other"
    )
    temperature: float | None = Field(0.0, ge=0.0, description="what is sent to the endpoint, or null for nothing")
    cache: str | None = Field(None, description="file of what it said about which image, or null")

    @model_validator(mode="after")
    def _check_range(self) -> Judge:
        if self.range[0] >= self.range[1]:
            raise ValueError(f"range: expected the lowest number first, got {list(self.range)}")
        return self


class Reward(Section):
    """What is rewarded: a weighted sum."""

    terms: dict[str, float] = Field(
        {"scene_graded": 1.0},
        description="weight by name (scene_graded, scene_strict, geneval_flow_grpo, geneval_graded, geneval_strict, "
        "ocr, pickscore, clip_score, hps, hps3, image_reward, aesthetic, remote, "
        "vlm_judge), or by module:function for one's own",
        min_length=1,
    )
    combine: Literal["sum", "advantages"] = Field(
        "sum",
        description="compare the weighted sums of a group's images, or make the advantages of each term by itself and "
        "sum these (GDPO)",
    )
    normalize: Literal["none", "batch"] = Field(
        "none",
        description="batch: every term has mean 0 and deviation 1 over an iteration's images before it is summed",
    )
    floors: dict[str, float] = Field(
        {}, description="by term, the value that lower ones count as, and that a closed gate leaves; else 0"
    )
    gates: dict[str, Annotated[dict[str, float], Field(min_length=1)]] = Field(
        {}, description="by term, what others must reach in an image for it to count, such as '{pickscore: {ocr: 0.8}}'"
    )
    extra_objects: Literal["punished", "ignored"] = Field(
        "punished", description="whether more objects than asked for cost geneval_graded something"
    )
    timeout: float = Field(
        900.0, gt=0.0, description="seconds until a term that has not returned for a batch of images counts as dead"
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the weights of rewards' models")
    models: RewardModels = RewardModels()
    remote: RemoteReward = RemoteReward()
    judge: Judge = Judge()

    @model_validator(mode="after")
    def _check_terms(self) -> Reward:
        named = {
            "floors": list(self.floors),
            "gates": [*self.gates, *(n for gate in self.gates.values() for n in gate)],
        }
        for key, names in named.items():
            if foreign := [name for name in names if name not in self.terms]:
                raise ValueError(
                    f"{key}: expected some of the terms {', '.join(self.terms)} (a weight may be 0), got {foreign[0]}"
                )
        if self.combine == "advantages" and self.normalize != "none":
            raise ValueError("normalize: expected none where combine is advantages, which normalises each term")
        return self


class Allocation(Section):
    """Where the advantage lands."""

    strength: Annotated[list[Share], BeforeValidator(_as_list)] = Field(
        [1.0],
        min_length=1,
        description="0 is uniform, 1 follows the map; one for all denoising steps, or a list with one for each, "
        "whose last entry is also that of the steps after it",
    )
    sharpness: float = Field(1.0, gt=0.0, description="exponent of the map")
    combine: Literal["mean", "max"] = Field("mean", description="across the units of a prompt")
    smooth: bool = Field(False, description="3x3 binomial filter")
    clamp: tuple[float, float] | None = Field(None, description="smallest and largest weight")
    layers: list[Layer] | None = Field(
        None,
        min_length=1,
        description="blocks that are recorded, by number or by name (such as mid_block or up_blocks.1 of a U-Net), or "
        "null for all",
    )
    implementation: Literal["auto", "fused", "sdpa"] = Field(
        "auto",
        description="attention of the recorded layers, in rollout and update alike: the library's kernel, PyTorch's "
        "with the mass from beside it, or the faster of the two; auto alone where a backend of diffusers computes it",
    )
    map: Literal["step", "geometric"] = Field(
        "step", description="each step's own map, or its geometric mean with that of the last step"
    )
    temporal: Literal["none", "std", "velocity"] = Field(
        "none",
        description="how much each trained step counts, its KL aside, whatever the method: all alike, in proportion "
        "to the sampler's noise s, or to (s/b)^2",
    )

    @property
    def recorded(self) -> dict[str, Any]:
        """The arguments of `star_kernels.record_attention` that say what attends, and where it is recorded."""
        return {"layers": self.layers, "implementation": self.implementation}

    def options(self, step: int) -> dict[str, Any]:
        """The arguments of `star_kernels.allocation_map` at a step."""
        strength = self.strength[min(step, len(self.strength) - 1)]
        return self.model_dump(exclude={"layers", "implementation", "map", "temporal"}) | {"strength": strength}


class Train(Section):
    """The update."""

    iterations: Positive = 30
    updates: Positive = Field(2, description="optimiser steps per iteration, each on its share of the samples")
    batch_size: Positive = Field(64, description="samples per backward pass")
    step_fraction: float = Field(0.5, gt=0.0, le=1.0, description="share of the denoising steps that is trained on")
    learning_rate: float = Field(3e-4, gt=0.0, description="of AdamW; train.lr for short")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="of AdamW: decay of its first and second moment")
    weight_decay: float = Field(0.0, ge=0.0)
    max_gradient_norm: float = Field(1.0, gt=0.0)
    granularity: Literal["image", "position"] = Field(
        "image",
        description="whether ratios are of images (weighted by the map), or of positions as STAR's paper has them; "
        "uniform_position has the latter",
    )
    objective: Literal["clip", "none", "guard", "dppo"] = Field(
        "clip", description="what holds the policy back: clipped ratios, nothing, GRPO-Guard or Flow-DPPO"
    )
    clip_range: float = Field(
        1e-4, ge=0.0, lt=1.0, description="of the image-level ratio; times sqrt(H*W) where ratios are per position"
    )
    clip_range_by_step: Literal["even", "spread"] = Field(
        "even",
        description="clip_range at every step, or as the mean of ranges in proportion to |b|/s, by which the "
        "log-ratios of the steps spread",
    )
    divergence_limit: float | None = Field(
        None, ge=0.0, description="of dppo: the divergence from which on nothing that goes further is trained on"
    )
    kl_weight: float = Field(0.0, ge=0.0, description="weight of the KL to the model without adapters")
    kl_scale: Literal["variance", "std_dev", "velocity"] = "variance"
    old_log_prob: Literal["rollout", "recompute"] = Field(
        "rollout",
        description="old log-probs as sampling gave them, or computed again by passes like those of the update",
    )
    advantage_std: Literal["group", "batch"] = Field("group", description="over what the reward's spread is taken")
    advantage_clip: float = Field(5.0, gt=0.0)
    ema_decay: float = Field(0.9, ge=0.0, lt=1.0, description="of the weights that are evaluated and exported")
    max_skipped_updates: Positive = Field(3, description="non-finite updates in a row after which the run ends")


class R0(Section):
    """Back-propagation of rewards through the sampler; only for the methods r0 and r0_plus."""

    eta: tuple[Share, Share] = Field(
        (0.0, 1.0), description="smallest and largest share of noise that a step draws anew; a trajectory draws its own"
    )
    gradient_steps: Positive | None = Field(
        None, description="how many of the last steps are back-propagated through, or null for all"
    )
    checkpointing: bool = Field(
        True, description="run each step again for its gradient instead of keeping the activations of all of them"
    )
    decode_batch_size: Positive = Field(8, description="images that are decoded and rewarded at a time")
    small_decoder: Place | None = Field(
        None, description="an AutoencoderTiny (folder or name on a hub) that decodes for rewards, or null"
    )
    normalize_gradients: bool = Field(
        True, description="scale each reward's gradient to length 1 per image before they are weighted and added"
    )
    regularizer: Literal["distance", "lora_norm"] = Field(
        "distance",
        description="what is kept small: the squared distance to the first weights over their squared norm, or half "
        "the squared norm of the adapters' own matrices",
    )
    regularizer_weight: float = Field(0.0, ge=0.0, description="its weight at the first iteration")
    regularizer_final: float | None = Field(None, ge=0.0, description="its weight at the last, or null for the same")
    regularizer_schedule: Literal["linear", "cosine"] = Field("linear", description="how it gets there")
    intermediate_weight: float = Field(
        0.5, ge=0.0, description="r0_plus: weight of the rewards of the images predicted before the last step"
    )
    guidance_weight: float = Field(
        0.1,
        ge=0.0,
        description="r0_plus: weight of the first model's guidance at the final latent; with normalize_gradients "
        "relative to the gradient of the rewards",
    )
    allocate: bool = Field(False, description="weight the rewards' gradient by region with the allocation map")
    stop_distance: float | None = Field(
        None, gt=0.0, description="end the run when the weights are this far from the first ones, relative to them"
    )
    stop_drop: float | None = Field(
        None,
        gt=0.0,
        description="end the run when the first held-out score, which need not be the one that is trained on, has "
        "fallen by this much",
    )


class Evaluation(Section):
    """Held-out prompts, fixed noise, no sampler noise."""

    prompts: int = Field(256, ge=2, description="held-out prompts, one image each")
    every: Positive = Field(10, description="iterations between evaluations")
    interim_prompts: int = Field(128, ge=2, description="prompts of the evaluations between the first and the last")
    steps: Positive = 20
    guidance_scale: float = Field(1.0, ge=1.0)
    group: Positive = Field(
        1,
        description="images per held-out prompt; above 1 their diversity is measured, by reward.models.clip",
    )
    pictures: Positive = Field(8, description="prompts shown in the pictures")


class Checkpoints(Section):
    """What a killed run goes on from."""

    every: Positive = Field(5, description="iterations between checkpoints")
    keep: int = Field(2, ge=2, description="how many are kept; at least two, in case one is damaged")


class Config(Section):
    """Everything that decides a run."""

    method: Method = Field("star", description="star, or a control: " + ", ".join(get_args(Method)[1:]))
    backend: Literal["auto", "triton", "cpu", "reference"] = Field(
        "auto", description="auto (each operator's fastest kernel here), triton, cpu, or reference (plain PyTorch)"
    )
    run: Run = Run()
    model: Model = Model()
    prompts: Prompts = Prompts()
    units: Units = Units()
    rollout: RolloutConfig = RolloutConfig()
    reward: Reward = Reward()
    allocation: Allocation = Allocation()
    train: Train = Train()
    r0: R0 = R0()
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()

    @model_validator(mode="before")
    @classmethod
    def _where_ratios_are_taken(cls, value: Any) -> Any:
        """By position with uniform_position; and by what null meant, in a file that an earlier version wrote."""
        if not isinstance(value, dict) or not isinstance(train := value.get("train", {}), dict):
            return value
        method = value.get("method")
        if "granularity" not in train and method == "uniform_position":
            train = train | {"granularity": "position"}
        elif train.get("granularity", "") is None:
            by_image = method in ("uniform", *REWARD_GRADIENT_METHODS)
            train = train | {"granularity": "image" if by_image else "position"}
        return value | {"train": train}

    @model_validator(mode="before")
    @classmethod
    def _few_steps(cls, value: Any) -> Any:
        """With r0 a generator of four steps, which is evaluated with the steps that it is trained with."""
        if not isinstance(value, dict) or value.get("method") not in REWARD_GRADIENT_METHODS:
            return value
        sections = {name: value.get(name, {}) for name in ("rollout", "evaluation")}
        if not all(isinstance(section, dict) for section in sections.values()):
            return value
        rollout = {"steps": 4, **sections["rollout"]}
        return value | {"rollout": rollout, "evaluation": {"steps": rollout["steps"], **sections["evaluation"]}}

    @property
    def needs_old_velocity(self) -> bool:
        """Whether the objective compares with the velocity that the rollout had, which is then kept."""
        return self.train.objective in ("guard", "dppo")

    @property
    def uses_maps(self) -> bool:
        """Whether the method needs maps made from attention, and so text units and a recorded rollout."""
        if self.trains_by_reward_gradient:
            return self.r0.allocate
        return self.method in ("star", "shuffled", "inverted")

    @property
    def trains_by_reward_gradient(self) -> bool:
        """Whether rewards are back-propagated through the sampler, and not compared within groups of samples."""
        return self.method in REWARD_GRADIENT_METHODS

    @property
    def needs_first_weights(self) -> bool:
        """Whether training compares the model with the one that it started from."""
        return self.train.kl_weight > 0.0 or self.trains_by_reward_gradient

    @model_validator(mode="after")
    def _check_combinations(self) -> Config:
        trained = self.rollout.prompts * self.rollout.samples
        if self.train.updates > trained:
            raise ValueError(f"train.updates: expected at most the {trained} samples of an iteration")
        compares = not self.trains_by_reward_gradient
        if compares and self.rollout.sampler in ("cps", "ddim") and self.rollout.eta > 1.0:
            raise ValueError(f"rollout.eta: expected at most 1 for the sampler {self.rollout.sampler}")
        if compares and self.rollout.sampler == "cps" and self.rollout.steps < 2:
            raise ValueError("rollout.steps: expected at least 2 for the sampler cps, whose last step has no noise")
        if compares and self.rollout.sampler == "flow_sde" and self.rollout.steps < 2:
            raise ValueError("rollout.steps: expected at least 2 for the sampler flow_sde, which needs a second level")
        if (self.rollout.sde_steps or 0) > self.rollout.steps:
            raise ValueError(f"rollout.sde_steps: expected at most the {self.rollout.steps} of rollout.steps")
        self._check_window()
        if self.train.kl_scale == "std_dev" and self.rollout.sampler in ("cps", "ddim"):
            raise ValueError(
                f"train.kl_scale: expected 'variance' or 'velocity' for the sampler {self.rollout.sampler}, which has "
                "no noise rate"
            )
        self._check_objective()
        if compares and self.rollout.samples < 2:
            raise ValueError(
                f"rollout.samples: expected at least 2 for the method {self.method}, which compares the samples of a "
                f"prompt, got {self.rollout.samples}"
            )
        if self.method == "shuffled" and self.rollout.prompts < 2:
            raise ValueError("rollout.prompts: expected at least 2 for the method shuffled, which exchanges maps")
        if self.method == "oracle" and self.prompts.source != "scenes":
            raise ValueError("method: oracle is for prompts.source=scenes, where it is known what an image shows")
        if self.model.adapter is not None and self.model.lora is None:
            raise ValueError("model.adapter: expected null where all weights are trained (model.lora=null)")
        limited_by, most = "steps", self.rollout.steps
        if compares and self.rollout.sde_window:
            limited_by, most = "sde_window.range", self.rollout.sde_window.range[1]
        elif compares and self.rollout.sde_steps:
            limited_by, most = "sde_steps", self.rollout.sde_steps
        if len(self.allocation.strength) > most:
            raise ValueError(
                f"allocation.strength: expected at most {most} entries (rollout.{limited_by}), "
                f"got {len(self.allocation.strength)}"
            )
        clamp = self.allocation.clamp
        if clamp is not None and not 0.0 <= clamp[0] <= 1.0 <= clamp[1]:
            raise ValueError(f"allocation.clamp: expected low <= 1 <= high, both at least 0, got {list(clamp)}")
        if (self.units.source == "llm") != (self.units.model is not None):
            raise ValueError("units.model: expected a chat model exactly where units.source is llm")
        if self.allocation.map == "geometric" and len(self.allocation.strength) > 1:
            raise ValueError("allocation.strength: expected one for all steps where allocation.map is geometric")
        if self.units.endpoint is not None and self.units.source != "llm":
            raise ValueError(f"units.endpoint: expected none where units.source is {self.units.source}")
        if (self.prompts.source == "scenes") != (self.prompts.held_out is None):
            raise ValueError("prompts.held_out: expected a file exactly when prompts.source is a file")
        if self.r0.eta[0] > self.r0.eta[1]:
            raise ValueError(f"r0.eta: expected the smallest share first, got {list(self.r0.eta)}")
        if self.trains_by_reward_gradient:
            self._check_reward_gradient()
        return self

    def _check_objective(self) -> None:
        train = self.train
        if self.method == "uniform_position" and train.granularity == "image":
            raise ValueError(
                "train.granularity: expected 'position' for the method uniform_position, got 'image', which is that of "
                "the method uniform"
            )
        if (train.objective == "dppo") != (train.divergence_limit is not None):
            raise ValueError(
                f"train.divergence_limit: expected a number exactly where train.objective is dppo, "
                f"got {train.divergence_limit} with {train.objective}"
            )
        if train.clip_range_by_step != "even" and train.objective != "clip":
            raise ValueError(f"train.clip_range_by_step: expected 'even' where train.objective is {train.objective}")

    def _check_window(self) -> None:
        window, steps = self.rollout.sde_window, self.rollout.steps
        if window is None:
            return
        first, end = window.range
        if end > steps or end - first < window.size:
            raise ValueError(
                f"rollout.sde_window.range: expected [first, end] with at least the {window.size} steps of the window "
                f"between them and end at most the {steps} of rollout.steps, got {list(window.range)}"
            )
        if self.rollout.sde_steps is not None:
            raise ValueError("rollout.sde_window: expected null where rollout.sde_steps says which steps draw noise")
        if self.rollout.sampler == "cps" and window.size == 1 and end == steps:
            raise ValueError(
                f"rollout.sde_window.range: expected an end below {steps} for one step of the sampler cps, whose last "
                f"step has no noise, got {list(window.range)}"
            )

    def _check_reward_gradient(self) -> None:
        steps = self.rollout.steps
        for section, keys in (
            ("train", ("granularity", "objective", "clip_range_by_step")),
            ("allocation", ("map", "temporal")),
        ):
            given = getattr(self, section)
            for key in keys:
                default = type(given).model_fields[key].default
                if getattr(given, key) != default:
                    raise ValueError(
                        f"{section}.{key}: expected {default!r} for the method {self.method}, which compares no "
                        f"samples, got {getattr(given, key)!r}"
                    )
        if self.rollout.eta > 1.0:
            raise ValueError(
                f"rollout.eta: expected at most 1 for the method {self.method}, which takes r0.eta, "
                f"got {self.rollout.eta}"
            )
        if (self.r0.gradient_steps or 0) > steps:
            raise ValueError(
                f"r0.gradient_steps: expected at most the {steps} of rollout.steps, got {self.r0.gradient_steps}"
            )
        if self.rollout.guidance_scale > 1.0:
            raise ValueError(
                f"rollout.guidance_scale: expected 1 for the method {self.method}, whose generator runs without "
                f"guidance, got {self.rollout.guidance_scale}"
            )
        if self.reward.combine != "sum" or self.reward.normalize != "none":
            raise ValueError(
                f"reward.combine: expected sum, and reward.normalize: none, for the method {self.method}, which "
                "compares no images; see r0.normalize_gradients"
            )
        if self.train.kl_weight > 0.0:
            raise ValueError(f"train.kl_weight: expected 0 for the method {self.method}; see r0.regularizer_weight")
        if self.model.sharded:
            raise ValueError(f"model.sharded: expected false for the method {self.method}")
        if self.r0.regularizer == "lora_norm" and self.model.lora is None:
            raise ValueError("r0.regularizer: expected 'distance' where all weights are trained, got 'lora_norm'")
