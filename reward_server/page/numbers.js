// How numbers are written on the page: a true minus sign, four decimals, and a sign on a change.

export function plain(value, decimals = 4) {
  const text = Math.abs(value).toFixed(decimals);
  return value < 0 && Number(text) !== 0 ? `−${text}` : text;
}

export function signed(value, decimals = 4) {
  const text = plain(value, decimals);
  return text.startsWith("−") || Number(text) === 0 ? text : `+${text}`;
}

/** Two digits that count, for numbers of any size. */
export function brief(value) {
  return Number(value.toPrecision(2)).toString();
}
