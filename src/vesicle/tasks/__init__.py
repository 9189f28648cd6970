"""Tasks that models are judged on: where their items come from, how they are asked and scored."""
