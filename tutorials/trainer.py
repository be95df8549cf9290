"""The Hugging Face ``Trainer`` on the ELBO, by one process or several.

    python tutorials/trainer.py --out out/trainer
    torchrun --nproc_per_node 2 tutorials/trainer.py --out out/trainer
    torchrun --nproc_per_node 2 tutorials/trainer.py --out out/trainer --steps 8 --resume

A checkpoint has the adapter and the trainer's state, and nothing of the network. Where there are no
graphics cards, ``ACCELERATE_USE_CPU=true`` before ``torchrun`` makes its processes work together.
"""

import argparse
from pathlib import Path

import pyro
from distributed import ANSWERS, NUM_DATA, ROWS, check_processes, data, end, network
from safetensors.torch import save_file
from transformers import TrainingArguments, default_data_collator

from pyro_blora import BayesianLoRA, guides, likelihoods, models
from pyro_blora.inference.trainer import BayesianLoRATrainer


def main() -> None:
    """Trains, evaluates and writes the adapter of each process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--guide", default="MatrixNormal", help="a class of pyro_blora.guides")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--out", type=Path, default=Path("out/trainer"), help="folder")
    train(parser.parse_args())
    end()


def train(arguments: argparse.Namespace) -> None:
    """What ``main`` says; all that it makes is gone when it returns."""
    pyro.settings.set(module_local_params=True)  # parameters belong to the modules
    options = TrainingArguments(
        str(arguments.out), max_steps=arguments.steps, save_steps=2, logging_steps=1, report_to=[]
    )
    check_processes(options.world_size)
    options.per_device_train_batch_size = ROWS // options.world_size
    blora = BayesianLoRA(
        network(),
        target_modules=["q_proj", "v_proj"],
        prior=models.KroneckerInducing(rank=2),
        guide=getattr(guides, arguments.guide)(),
        likelihood=likelihoods.LabelTokens(token_ids=ANSWERS, num_data=NUM_DATA),
    )
    trainer = BayesianLoRATrainer(
        blora,
        options,
        train_dataset=data(),
        eval_dataset=data(),
        data_collator=default_data_collator,
    )
    trainer.train(resume_from_checkpoint=arguments.resume or None)
    trainer.evaluate()
    tensors = {name: t.detach().cpu().clone() for name, t in blora.state_dict().items()}
    save_file(tensors, arguments.out / f"process-{options.process_index}.safetensors")


if __name__ == "__main__":
    main()
