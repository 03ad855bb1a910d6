// The provider's callback: turns the code in the address into a session, or the error into a sentence.

import { ApiError, passes, pause, post, sentence } from "../api.js";
import { who } from "../storage.js";

/** @type {Record<string, string>} */
const ERRORS = {
  access_denied: "You did not allow the login.",
  bad_state: "That login took too long or started in another browser. Please try again.",
  provider_error: "The login provider answered with an error. Please try again.",
  provider_unavailable: "The login provider cannot be reached. Please try again later.",
  bad_profile: "The login provider did not say who you are.",
  unavailable: "Messenger is not available right now. Please try again later.",
  internal: "Something went wrong while logging you in. Please try again.",
};

/** @param {URLSearchParams} query @returns {Promise<string>} Empty after a login; else why it failed. */
export async function exchange(query) {
  const error = query.get("error");
  if (error) return ERRORS[error] ?? "The login failed. Please try again.";
  const code = query.get("code");
  if (!code) return "That login link is not complete. Please try again.";
  for (let tries = 0; ; tries += 1) {
    try {
      const { body } = await post("/api/oauth/exchange", { code });
      who.set(body.authUser.id);
      return "";
    } catch (thrown) {
      // If the answer is lost, the code may be used up; then the next attempt is rejected, and the cookie decides.
      if (passes(thrown) && tries < 2) await pause(1000);
      else if (!(thrown instanceof ApiError && thrown.status === 401)) return sentence(thrown);
      else return tries > 0 ? "" : "That login link was used already or is too old. Please try again.";
    }
  }
}
