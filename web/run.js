// One training run as the page has seen it: the server's events in, numbers for the curve out. No page in here.

const MAX_POINTS = 4000;
const SPEED_WINDOW = 15; // seconds

export class Run {
  constructor(promptId) {
    this.promptId = promptId;
    this.step = 0;
    this.steps = 0;
    this.seconds = 0;
    this.learningRate = undefined;
    /** Set when the run was cancelled or failed. */
    this.stopped = false;
    /** [{step, loss, smooth, seconds}], by step; every second one is dropped when they are too many to draw. */
    this.points = [];
    /** [{step, loss}], by step; the one at step 0 is the model before training. */
    this.validations = [];
    this.sum = 0;
    this.weight = 0;
  }

  get done() {
    return this.steps > 0 && this.step >= this.steps;
  }

  /** The validation loss before training, or undefined where it was not measured or not seen. */
  get base() {
    return this.validations[0]?.step === 0 ? this.validations[0].loss : undefined;
  }

  /** Whether this event cannot belong to this run, so that a new one begins. */
  isOver(event) {
    return event.prompt_id !== this.promptId || event.step < this.step;
  }

  add(event) {
    if (event.validation_loss !== undefined) this.addValidation(event);
    else this.addStep(event);
  }

  addValidation({ step, validation_loss: loss }) {
    if (!Number.isFinite(loss)) return;
    this.validations = this.validations.filter((other) => other.step !== step);
    this.validations.push({ step, loss });
  }

  addStep({ step, steps, loss, lr, seconds }) {
    const gap = Math.max(1, step - this.step);
    Object.assign(this, { step, steps, seconds, learningRate: lr, stopped: false });
    if (!Number.isFinite(loss)) return; // a skipped step
    // Exponential average over about steps / 25 steps. Dividing by the weights' sum removes the start's bias.
    const keep = Math.exp(-gap / Math.min(200, Math.max(5, steps / 25)));
    this.sum = keep * this.sum + (1 - keep) * loss;
    this.weight = keep * this.weight + (1 - keep);
    this.points.push({ step, loss, smooth: this.sum / this.weight, seconds });
    if (this.points.length > MAX_POINTS) this.points = this.points.filter((_, index) => index % 2 === 1);
  }

  /** Steps per second lately, or undefined before there are two events. */
  speed() {
    const last = this.points.at(-1);
    const first = this.points.find((point) => point.seconds >= last.seconds - SPEED_WINDOW);
    if (!first || first === last) return undefined;
    return (last.step - first.step) / (last.seconds - first.seconds);
  }

  /** Seconds until the end at the present speed, or undefined. */
  secondsLeft() {
    const speed = this.speed();
    return speed ? (this.steps - this.step) / speed : undefined;
  }
}
