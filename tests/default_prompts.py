"""Twenty prompts as people write them, for checks on the real default model."""

PROMPTS = (
    "Summarize the following text: The Industrial Revolution, which took place from the 18th to "
    "19th centuries, was a period during which predominantly agrarian, rural societies in Europe "
    "and America became industrial and urban. Prior to the Industrial Revolution, which began in "
    "Britain in the late 1700s, manufacturing was often done in people's homes, using hand tools "
    "or basic machines.",
    "Why is the sky blue?",
    "Write a short poem about the sea in winter.",
    "What is the capital of Australia, and what is it known for?",
    "Explain photosynthesis to a ten-year-old.",
    "Translate into French: The weather is nice today and we are going to the beach.",
    "List five healthy breakfast ideas.",
    "Write a Python function that returns the factorial of a number.",
    "Who wrote Pride and Prejudice?",
    "What are the main causes of inflation?",
    "Give me three tips for a job interview.",
    "How do I boil an egg so that the yolk stays soft?",
    "Describe the water cycle in four sentences.",
    "What is the difference between a virus and a bacterium?",
    "Continue the story: The old lighthouse keeper climbed the stairs one last time and",
    "Is it safe to eat raw potatoes?",
    "Write an email asking my landlord to repair the heating.",
    "What happened in the year 1969?",
    "Solve step by step: a train travels 120 km in 1.5 hours. What is its average speed?",
    "Name the planets of the solar system from the sun outwards.",
)
