// One training run as the page has seen it: the server's events in, numbers for the curve out. No page in here.

const MAX_POINTS = 4000;

export class Run {
  constructor(promptId) {
    this.promptId = promptId;
    this.step = 0;
    this.steps = 0;
    this.seconds = 0;
    /** The latest {lr, grad_norm, memory, speed, seconds_left}; null is what is not known. */
    this.now = {};
    /** Set when the run was cancelled or failed. */
    this.stopped = false;
    /** [{step, loss, smooth}], by step; every second one is dropped when they are too many to draw. */
    this.points = [];
    /** [{step, loss}], by step; the one at step 0 is the model before training. */
    this.validations = [];
    /** The validation loss of the model before training, or undefined where it was not measured. */
    this.base = undefined;
  }

  get done() {
    return this.steps > 0 && this.step >= this.steps;
  }

  /** Whether this event cannot belong to this run, so that a new one begins. */
  isOver(event) {
    return event.prompt_id !== this.promptId || event.step < this.step;
  }

  add(event) {
    if (event.validation_loss !== undefined) this.addValidation(event);
    else this.addStep(event);
  }

  addValidation({ step, validation_loss: loss, base }) {
    if (Number.isFinite(base)) this.base = base;
    if (!Number.isFinite(loss)) return;
    this.validations = this.validations.filter((other) => other.step !== step);
    this.validations.push({ step, loss });
  }

  addStep({ step, steps, loss, smooth, seconds, ...now }) {
    Object.assign(this, { step, steps, seconds, now, stopped: false });
    if (!Number.isFinite(loss) || !Number.isFinite(smooth)) return; // a skipped step
    this.points.push({ step, loss, smooth });
    if (this.points.length > MAX_POINTS) this.points = this.points.filter((_, index) => index % 2 === 1);
  }
}
