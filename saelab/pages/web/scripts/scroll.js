// Where a virtual table is, in pixels, without any element. Browsers cap an element's height (17.9M px in Firefox), so the
// spacer stops at a height that every browser takes and a far jump maps its share of the way to a row.

import { clamp } from "./numbers.js";

export const ROW = 32;
export const TALLEST = 8_000_000;

export class Scroll {
  /** @param {() => number} count how many rows there are @param {() => number} seen how many pixels of them are seen */
  constructor(count, seen) {
    this.count = count;
    this.seen = seen;
    this.place = 0; // pixels from the first row
    this.top = 0; // of the view, as it was last
  }
  /** Pixels of all rows. */
  get whole() {
    return this.count() * ROW;
  }
  /** Pixels of the spacer that stands for them. */
  get height() {
    return Math.min(this.whole, TALLEST);
  }
  /** How far the rows go, and how far the view does. */
  get reach() {
    return Math.max(0, this.whole - this.seen());
  }
  get span() {
    return Math.max(0, this.height - this.seen());
  }
  /** Where the view should stand for this place. */
  get share() {
    return Math.round(this.reach ? (this.place / this.reach) * this.span : 0);
  }
  /** [first row to draw, how many]. */
  get shown() {
    const first = Math.floor(this.place / ROW);
    return [first, Math.max(0, Math.min(this.count() - first, Math.ceil(this.seen() / ROW) + 1))];
  }
  /** The view was scrolled: by a little, to the pixel; by far, to its share of the way. @param {number} top */
  moved(top) {
    const far = Math.abs(top - this.top) > this.seen() || this.whole <= TALLEST;
    const place = far ? (this.span ? (top / this.span) * this.reach : 0) : this.place + top - this.top;
    this.place = clamp(place, 0, this.reach);
    this.top = top;
  }
  /** A row comes into sight, by the shortest way. @param {number} index */
  reveal(index) {
    const at = index * ROW;
    if (at < this.place) this.place = at;
    else if (at + ROW > this.place + this.seen()) this.place = at + ROW - this.seen();
    this.place = clamp(this.place, 0, this.reach);
  }
}
