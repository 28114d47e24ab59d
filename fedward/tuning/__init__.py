"""What site and coordinator share: base models, PEFT methods, objectives, data, metrics."""
