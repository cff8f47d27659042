"""The page's words in plain language: what each section and each figure shows, and what it does not."""

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

#: section -> (what is shown and how to read it, what not to conclude from it)
OPENINGS: dict[str, tuple[str, str]] = {
    "results": (
        "How many of the test questions each model answers correctly, in per cent: a dot is the figure, its bar the "
        "95 % interval, a hollow dot the same model with something changed at inference (such as latents masked).",
        "Do not conclude from one run which recipe is better: another seed moves the figure, too. Overlapping bars do "
        "not mean 'no difference'; the table of paired differences answers that.",
    ),
    "published": (
        "The paper's table with our own figures under the printed ones: 'ours' is what the given runs answer, with its "
        "95 % interval, and 'ours − paper' the difference in points; 'not run' says that nothing was measured.",
        "Do not read a difference smaller than its interval as a failure or a success in reproducing: with 115 to 300 "
        "questions a figure is known to about ± 5 points. A printed figure marked † cannot be right as it stands.",
    ),
    "arms": (
        "Each row an arm (several seeds of it pooled), each column a kind of question: per cent correct with the 95 % "
        "interval; below, what each arm has over the reference arms on the same questions, and how sure that is.",
        "Do not pick out the one comparison below 0.05: many are made, and the Holm value allows for that. An arm of "
        "one run may owe its figure to its seed.",
    ),
    "gaze": (
        "Where each model looks while it answers: brighter is more attention, each map scaled to its own maximum; the "
        "green frame is the annotated region, and below each map stands the share of its mass inside the frame.",
        "Do not conclude that a model answers because it looks there: a map is where attention goes, not what decides. "
        "The samples are illustrations; the table below covers the whole set.",
    ),
    "interventions": (
        "The same questions again with one thing changed at inference: blue bars change the latents, orange ones the "
        "image; a longer bar means that the answers depend more on what was changed. Whiskers are 95 % intervals.",
        "Do not conclude from a long bar alone that the latents hold what was seen: a change can also break the model "
        "by being unlike anything it was trained on. Short bars on the latents do mean that answers hardly need them.",
    ),
    "analyses": (
        "Pictures of the analyses that were run on these models; the figures behind each stand in the file it names.",
        "Do not conclude cause from any of them: they show what goes together.",
    ),
    "training": (
        "What was logged while training, over the steps: faint as logged, strong a running mean over 5 % of the steps; "
        "a run without a line in a panel does not have that quantity.",
        "Do not compare total losses between recipes, since each adds up other parts, and do not conclude from a lower "
        "training loss that more test questions are answered.",
    ),
    "compared": (
        "In which settings the recipes differ, one column a model; all other settings are the same.",
        "Do not put a difference in results down to one setting where several differ.",
    ),
}
