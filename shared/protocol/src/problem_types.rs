//! Every kind of error answer: what `/problems/{code}` says of it. [`crate::problem::Problem`] takes no other code.

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProblemType {
    pub code: &'static str,
    pub title: &'static str,
    pub happened: &'static str,
    pub to_do: &'static str,
}

const fn of(
    code: &'static str,
    title: &'static str,
    happened: &'static str,
    to_do: &'static str,
) -> ProblemType {
    ProblemType { code, title, happened, to_do }
}

/// By their codes.
#[rustfmt::skip]
pub const ALL: &[ProblemType] = &[
    of("bad_body", "The body cannot be read",
        "The body is not UTF-8, not JSON, or not of the shape that the operation takes.",
        "Read message: it says where. Compare the body with /api/openapi.json."),
    of("bad_gateway", "The service does not answer",
        "The proxy of a development machine found no service behind the address.",
        "Look whether the service runs (cargo dev status), and try again."),
    of("bad_host", "The Host header is not usable",
        "An HTTP/1.1 request had no Host header, several, or one that is not a host.",
        "Send exactly one Host header with the host and port of the address."),
    of("bad_target", "The request target is not a path",
        "The first line of the request does not name a path that begins with a slash.",
        "Send a path, not a whole address and not an asterisk. Proxies do this for their clients."),
    of("body_too_large", "The body is too large",
        "The body has more bytes than the operation takes.",
        "Send less: a shorter text, fewer names, fewer events in one request. GET /api/limits has the bounds of texts and groups."),
    of("body_too_slow", "The body did not arrive in time",
        "The connection was too slow, or the client did not send the body that it announced.",
        "Try again over a better connection. Check that Content-Length is the length of the body."),
    of("cannot_be_added", "This user cannot be added",
        "The user does not let you add them to a group. It is not said why.",
        "Write to them directly, or let another owner of the group add them."),
    of("cannot_start_with_yourself", "No conversation with yourself",
        "The username is your own.",
        "Name another user."),
    of("conversation_not_found", "Conversation not found",
        "There is no such conversation, or you do not take part in it (any more).",
        "List yours with GET /api/conversations."),
    of("edit_window_over", "The message is too old to be edited",
        "A message can be edited for editWindowSeconds of GET /api/limits.",
        "Delete it, or send another one."),
    of("group_full", "The group is full",
        "The group has maxGroupSize members (GET /api/limits).",
        "Remove a member first, or make another group."),
    of("internal", "Internal server error",
        "A defect of the service. Nothing of the request was done.",
        "Try again later. Tell the operator the requestId: it finds the cause in the logs."),
    of("last_owner", "A group has at least one owner",
        "The change would leave the group without an owner.",
        "Make another member an owner first."),
    of("message_not_found", "Message not found",
        "There is no such message, it was deleted, or you do not see it.",
        "Read the conversation again."),
    of("method_not_allowed", "Method not allowed",
        "The path exists, and does not take this method.",
        "Use one of the methods in the header Allow."),
    of("no_external_issuer", "There are no subjects here",
        "The operation names a user by a subject, and EXTERNAL_ISSUER is not set.",
        "The operator sets EXTERNAL_ISSUER on every replica of api."),
    of("not_a_group", "Not a group",
        "The conversation is one of two users. It has no title, owners or members to change.",
        "Make a group with POST /api/conversations and usernames."),
    of("not_acceptable", "An EventSource connection is required",
        "The header Accept does not name text/event-stream.",
        "Send Accept: text/event-stream, as EventSource does."),
    of("not_found", "Not found",
        "There is nothing at this path, or what it names does not exist, or is not yours to see.",
        "Compare the path with /api/openapi.json."),
    of("not_owner", "Only an owner can do this",
        "You are a member of the group, not one of its owners.",
        "Ask an owner: GET /api/conversations/{id}/participants has the roles."),
    of("not_yours", "This message is not yours",
        "Only its sender may edit a message; its sender or an owner of the group may delete it.",
        "Ask them."),
    of("origin_not_allowed", "The page's origin is not allowed",
        "A page of another origin used the session cookie.",
        "If the page is one of the product's, the operator adds its origin (message names it) to ALLOWED_ORIGINS of both services. \
         A program uses a bearer token."),
    of("rate_limited", "Too many requests",
        "A limit per user, address or service token was used up.",
        "Wait for the seconds in the header Retry-After. A client that repeats at once waits longer."),
    of("scope_required", "The service token lacks a scope",
        "The token is valid, and was not made for this operation.",
        "The operator makes one with the scope that message names: api service-token create --name … --scope …"),
    of("service_token_required", "A service token is required",
        "The operation is for other back ends, and the credential is a user's.",
        "Call it from a back end, with a service token in the header Authorization. Never give one to a page."),
    of("unacceptable", "The request is not acceptable",
        "The request is well-formed, and a value in it is not.",
        "Read errors: one sentence for each field."),
    of("unauthorized", "Unauthorized",
        "There is no credential, or it is not valid: malformed, expired, of another audience, or its session has ended.",
        "Log in again, or get a new token. With a token in the header, no cookie is looked at."),
    of("unavailable", "Service unavailable",
        "Something that the service needs does not answer now. Nothing of the request was done, or it was done and the answer was lost.",
        "Try again after the seconds in Retry-After; a send with the same Idempotency-Key, so that it happens once."),
    of("unsupported_media_type", "Content type of application/json required",
        "The operation takes a body in JSON, and Content-Type says something else or is missing.",
        "Send Content-Type: application/json."),
    of("user_not_found", "User not found",
        "Nobody has this name or id, or not in this group.",
        "Find names with GET /api/usernames?search=."),
    of("user_token_required", "A user's token is required",
        "The operation is a user's own, and the credential is a service token.",
        "Call it with the token or cookie of the user."),
];

pub fn find(code: &str) -> Option<&'static ProblemType> {
    ALL.iter().find(|kind| kind.code == code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_code_is_there_once_and_says_what_to_do() {
        assert!(ALL.windows(2).all(|pair| pair[0].code < pair[1].code), "in the order of their codes");
        for ProblemType { code, title, happened, to_do } in ALL {
            assert!(code.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'), "{code}");
            assert!(!title.ends_with('.'), "{code}");
            for sentence in [happened, to_do] {
                assert!(sentence.ends_with(['.', '…']), "{code}: {sentence}");
            }
        }
    }
}
