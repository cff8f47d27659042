"""The reading guide of the page, in plain language: what each figure shows and what it does not."""

GUIDE: tuple[tuple[str, str], ...] = (
    (
        "The models",
        "The base student is the starting point. Naive SFT trains it on answers alone. LaViT trains it on the same "
        "samples for the same number of steps, but makes it produce latent tokens before the answer, and trains "
        "these to look where the teacher looked (trajectory) and to hold what the teacher understood (concept). Its "
        "gate keeps the answer from looking at the image at first and opens slowly. 'Latents off' is the same "
        "trained model with its latents masked at inference.",
    ),
    (
        "Accuracy and its interval",
        "The share of questions answered correctly. The interval says how much the figure could move had other "
        "questions of the same sort been drawn: it covers the long-run accuracy of this one trained model in 95 of "
        "100 such test sets (Wilson's score interval). It says nothing about training again with another seed.",
    ),
    (
        "Paired difference",
        "Two models answered the same questions, so they are compared question by question, which is sharper than "
        "looking whether two intervals overlap. The interval comes from redrawing the questions; when it leaves out "
        "0, the difference is unlikely to be luck of the questions. McNemar's p is the chance of a split at least "
        "as uneven among the questions on which exactly one of the two is right, if neither were better. With "
        "several comparisons, expect one in twenty below 0.05 by chance alone.",
    ),
    (
        "Training curves",
        "The answer loss is comparable between runs; the total loss is not, since each recipe adds up other parts. "
        "The concept loss is 0 when the last latent points in the direction of the teacher's semantics; the "
        "trajectory loss is 0 when the latents' attention equals the teacher's map. The gate is 0 when the answer "
        "cannot see the image and 1 when nothing is hidden; evaluation always runs with it open.",
    ),
    (
        "Gaze maps",
        "The attention that text or latent tokens pay to the image, averaged over heads and layers as the recipe "
        "says, and stretched from a coarse grid of image tokens to the picture. A map shows where attention goes; "
        "it does not prove that the answer was decided there. The samples are illustrations; the table of attention "
        "statistics covers the whole set it names.",
    ),
    (
        "Entropy, salient regions, CV",
        "Three measures of how focused a map is. Low entropy, few patches above 1.5 times the mean and a high "
        "coefficient of variation all mean that the looking is concentrated. Concentrated is not the same as right: "
        "the mass inside the box says whether it is concentrated in the right place.",
    ),
)
