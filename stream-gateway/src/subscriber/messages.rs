//! Takes the published messages out of a connection's bytes before the redis library parses them, so that a message costs no
//! allocation and no task switch. Everything else, such as replies, is passed to the library; confirmations without their channels.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::{Buf, BufMut, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::io::poll_read_buf;

/// Bytes read at a time. A read that fills it lets the engine deliver before the next one.
const READ: usize = 64 * 1024;
/// A read completes at most one message that began before it, and messages without channel and payload.
pub(super) const MESSAGES_PER_READ: usize = 1 + READ / b">3\r\n$7\r\nmessage\r\n$0\r\n\r\n$0\r\n\r\n".len();
/// A longer reply is an error: we request nothing that has one.
const MAX_REPLY: usize = 1024 * 1024;
/// Of replies inside one another.
const MAX_DEPTH: usize = 8;

/// How the confirmations of SUBSCRIBE and UNSUBSCRIBE begin. Those of a cluster stay as they are, because their channels are read.
const CONFIRMATIONS: [&[u8]; 2] = [b">3\r\n$9\r\nsubscribe\r\n", b">3\r\n$11\r\nunsubscribe\r\n"];

/// Receives the messages.
pub(super) trait Receiver: Send + Unpin + 'static {
    /// Whether there is room for [`MESSAGES_PER_READ`] messages.
    fn has_room(&self) -> bool;
    /// `payload`: `None` if it is longer than the limit of the [`MessageStream`]. `late`: the connection is behind.
    fn receive(&mut self, channel: &[u8], payload: Option<&[u8]>, late: bool);
    /// The connection is not behind any more.
    fn caught_up(&mut self);
}

/// A connection without its messages.
pub(super) struct MessageStream<S, R> {
    stream: S,
    receiver: R,
    /// In bytes. Of a longer payload nothing is kept.
    max_payload: usize,
    /// Since when no read has emptied the socket.
    waiting_since: Option<Instant>,
    /// A connection is behind after so long.
    patience: Duration,
    /// Begins with a frame, or with what is left to `skip`.
    input: BytesMut,
    skip: usize,
    /// For the library.
    replies: BytesMut,
}

impl<S, R: Receiver> MessageStream<S, R> {
    pub(super) fn new(stream: S, max_payload: usize, patience: Duration, receiver: R) -> Self {
        Self {
            stream,
            receiver,
            max_payload,
            waiting_since: None,
            patience,
            input: BytesMut::new(),
            skip: 0,
            replies: BytesMut::new(),
        }
    }

    fn catch_up(&mut self) {
        if self.waiting_since.take().is_some() {
            self.receiver.caught_up();
        }
    }

    /// Hands over all frames that are complete. `more`: the socket probably has others.
    fn take_frames(&mut self, more: bool) -> io::Result<()> {
        if !more {
            self.catch_up();
        }
        let late = self.waiting_since.is_some_and(|since| since.elapsed() >= self.patience);
        if more {
            self.waiting_since.get_or_insert_with(Instant::now);
        }
        loop {
            let skipped = self.skip.min(self.input.len());
            self.input.advance(skipped);
            self.skip -= skipped;
            let Some(frame) = Frame::parse(&self.input, self.max_payload).map_err(invalid)? else {
                let too_long = self.input.len() > MAX_REPLY;
                return if too_long { Err(invalid(Invalid)) } else { Ok(()) };
            };
            let length = match frame {
                Frame::Message { channel, payload, length } => {
                    self.receiver.receive(channel, payload, late);
                    length
                }
                Frame::Confirmation { kind, count, length } => {
                    self.replies.extend_from_slice(kind);
                    self.replies.extend_from_slice(b"$0\r\n\r\n");
                    self.replies.extend_from_slice(count);
                    length
                }
                Frame::Other { length } => {
                    self.replies.extend_from_slice(&self.input[..length]);
                    length
                }
            };
            self.skip = length;
        }
    }
}

impl<S: AsyncRead + Unpin, R: Receiver> AsyncRead for MessageStream<S, R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            if !this.replies.is_empty() {
                let count = this.replies.len().min(buffer.remaining());
                buffer.put_slice(&this.replies[..count]);
                this.replies.advance(count);
                return Poll::Ready(Ok(()));
            }
            if this.receiver.has_room() {
                this.input.reserve(READ);
                let mut input = (&mut this.input).limit(READ);
                let Poll::Ready(count) = poll_read_buf(Pin::new(&mut this.stream), cx, &mut input) else {
                    this.catch_up();
                    return Poll::Pending;
                };
                let count = count?;
                if count == 0 {
                    return Poll::Ready(Ok(()));
                }
                this.take_frames(count == READ)?;
                // After a short read, tokio knows without a system call that the socket is empty.
                if count < READ || !this.replies.is_empty() {
                    continue;
                }
            }
            // The engine, on this thread, takes what was received before this task runs again.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
    }
}

impl<S: AsyncWrite + Unpin, R: Unpin> AsyncWrite for MessageStream<S, R> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Frame<'a> {
    /// `length`: also of a payload that has not arrived.
    Message {
        channel: &'a [u8],
        payload: Option<&'a [u8]>,
        length: usize,
    },
    /// Of a subscription. The library counts confirmations, and would keep the name of each channel until its unsubscription: 73
    /// bytes per user. It needs them only for an UNSUBSCRIBE without names, which we do not send.
    Confirmation {
        kind: &'a [u8],
        count: &'a [u8],
        length: usize,
    },
    Other {
        length: usize,
    },
}

/// Not RESP, or longer than anything that we requested.
#[derive(Debug, PartialEq, Eq)]
struct Invalid;

fn invalid(_: Invalid) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "Redis sent an invalid reply")
}

impl<'a> Frame<'a> {
    /// The first frame, if it is complete.
    fn parse(input: &'a [u8], max_payload: usize) -> Result<Option<Self>, Invalid> {
        let mut reader = Reader { input, at: 0 };
        let message = input.strip_prefix(b">3\r\n$7\r\nmessage\r\n");
        let Some(rest) = message.or_else(|| input.strip_prefix(b">3\r\n$8\r\nsmessage\r\n")) else {
            if let Some(kind) = CONFIRMATIONS.into_iter().find(|kind| input.starts_with(kind)) {
                reader.at = kind.len();
                let Some(()) = reader.skip_value(0)? else { return Ok(None) };
                let counted_from = reader.at;
                let Some(()) = reader.skip_value(0)? else { return Ok(None) };
                let count = &input[counted_from..reader.at];
                return Ok(Some(Self::Confirmation { kind, count, length: reader.at }));
            }
            let whole = reader.skip_value(0)?.is_some();
            return Ok(whole.then_some(Self::Other { length: reader.at }));
        };
        reader.at = input.len() - rest.len();
        let Some(length) = reader.bulk_length()? else { return Ok(None) };
        let Some(channel) = reader.bytes(length)? else { return Ok(None) };
        let Some(length) = reader.bulk_length()? else { return Ok(None) };
        if length > max_payload {
            let length = reader.at.saturating_add(length).saturating_add(b"\r\n".len());
            return Ok(Some(Self::Message { channel, payload: None, length }));
        }
        let Some(payload) = reader.bytes(length)? else { return Ok(None) };
        Ok(Some(Self::Message { channel, payload: Some(payload), length: reader.at }))
    }
}

/// Everywhere `None`: more bytes must come.
struct Reader<'a> {
    input: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    /// Up to the end of a line.
    fn line(&mut self) -> Result<Option<&'a [u8]>, Invalid> {
        let rest = &self.input[self.at..];
        let Some(end) = rest.iter().position(|byte| *byte == b'\n') else { return Ok(None) };
        self.at += end + 1;
        rest[..end].strip_suffix(b"\r").map(Some).ok_or(Invalid)
    }

    fn bulk_length(&mut self) -> Result<Option<usize>, Invalid> {
        let Some(line) = self.line()? else { return Ok(None) };
        line.strip_prefix(b"$").and_then(length).map(Some).ok_or(Invalid)
    }

    /// As many bytes, and the end of a line.
    fn bytes(&mut self, length: usize) -> Result<Option<&'a [u8]>, Invalid> {
        let rest = &self.input[self.at..];
        let end = length.checked_add(b"\r\n".len()).ok_or(Invalid)?;
        let Some(with_end) = rest.get(..end) else { return Ok(None) };
        self.at += end;
        with_end.strip_suffix(b"\r\n").map(Some).ok_or(Invalid)
    }

    fn skip_value(&mut self, depth: usize) -> Result<Option<()>, Invalid> {
        let Some(line) = self.line()? else { return Ok(None) };
        let (kind, value) = line.split_first().ok_or(Invalid)?;
        if value == b"-1" && matches!(kind, b'$' | b'*') {
            return Ok(Some(()));
        }
        let values = match kind {
            b'+' | b'-' | b':' | b'_' | b',' | b'#' | b'(' => 0,
            b'$' | b'!' | b'=' => {
                let length = length(value).filter(|length| *length <= MAX_REPLY).ok_or(Invalid)?;
                return Ok(self.bytes(length)?.map(|_| ()));
            }
            b'*' | b'~' | b'>' => length(value).ok_or(Invalid)?,
            b'%' => length(value).and_then(|pairs| pairs.checked_mul(2)).ok_or(Invalid)?,
            // Attributes, and the value that has them.
            b'|' => length(value).and_then(|pairs| pairs.checked_mul(2)?.checked_add(1)).ok_or(Invalid)?,
            _ => return Err(Invalid),
        };
        if depth > MAX_DEPTH {
            return Err(Invalid);
        }
        for _ in 0..values {
            if self.skip_value(depth + 1)?.is_none() {
                return Ok(None);
            }
        }
        Ok(Some(()))
    }
}

fn length(digits: &[u8]) -> Option<usize> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use futures_util::FutureExt;
    use proptest::prelude::*;
    use tokio::io::AsyncReadExt;

    use super::*;

    const MAX: usize = 20;

    type Message = (String, Option<String>);

    #[derive(Clone, Default)]
    struct Received {
        messages: Arc<Mutex<Vec<Message>>>,
        room: Arc<Mutex<Option<usize>>>,
        late: Arc<Mutex<usize>>,
    }

    impl Receiver for Received {
        fn has_room(&self) -> bool {
            match &mut *self.room.lock().unwrap() {
                Some(0) => false,
                Some(reads) => {
                    *reads -= 1;
                    true
                }
                None => true,
            }
        }

        fn receive(&mut self, channel: &[u8], payload: Option<&[u8]>, late: bool) {
            if late {
                return *self.late.lock().unwrap() += 1;
            }
            let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
            self.messages.lock().unwrap().push((text(channel), payload.map(text)));
        }

        fn caught_up(&mut self) {
            self.messages.lock().unwrap().push(("caught up".into(), None));
        }
    }

    /// Brings the pieces one by one.
    struct Pieces(Vec<Vec<u8>>);

    impl AsyncRead for Pieces {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buffer: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            if !self.0.is_empty() {
                let mut piece = self.0.remove(0);
                let rest = piece.split_off(piece.len().min(buffer.remaining()));
                buffer.put_slice(&piece);
                if !rest.is_empty() {
                    self.0.insert(0, rest);
                }
            }
            Poll::Ready(Ok(()))
        }
    }

    fn message(kind: &str, channel: &str, payload: &str) -> String {
        let bulk = |text: &str| format!("${}\r\n{text}\r\n", text.len());
        format!(">3\r\n{}{}{}", bulk(kind), bulk(channel), bulk(payload))
    }

    fn read(pieces: Vec<Vec<u8>>) -> (io::Result<String>, Vec<Message>) {
        let received = Received::default();
        let mut stream = MessageStream::new(Pieces(pieces), MAX, Duration::MAX, received.clone());
        let mut replies = String::new();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let result = runtime.block_on(stream.read_to_string(&mut replies));
        let messages = std::mem::take(&mut *received.messages.lock().unwrap());
        (result.map(|_| replies), messages)
    }

    const REPLIES: [&str; 13] = [
        "+OK\r\n",
        "-NOPERM no\r\n",
        ":17\r\n",
        "_\r\n",
        "$-1\r\n",
        "*-1\r\n",
        "$5\r\na\r\nbc\r\n",
        "=6\r\ntxt:hi\r\n",
        "%2\r\n$5\r\nproto\r\n:3\r\n$4\r\nmods\r\n*2\r\n*0\r\n#t\r\n",
        "|1\r\n+ttl\r\n:7\r\n*1\r\n,1.5\r\n",
        ">3\r\n$9\r\nsubscribe\r\n$8\r\nt:user:1\r\n:1\r\n",
        ">3\r\n$11\r\nunsubscribe\r\n$8\r\nt:user:1\r\n:0\r\n",
        ">3\r\n$12\r\nsunsubscribe\r\n$8\r\nt:user:1\r\n:0\r\n",
    ];

    /// What the library gets of it.
    fn without_channel(reply: &str) -> String {
        let confirms = CONFIRMATIONS.into_iter().any(|kind| reply.as_bytes().starts_with(kind));
        if confirms { reply.replace("$8\r\nt:user:1\r\n", "$0\r\n\r\n") } else { reply.into() }
    }

    proptest! {
        #[test]
        fn messages_and_confirmed_channels_are_taken_out(
            frames in proptest::collection::vec((0..17usize, "[a-z:\r\n]{1,12}", "[ -~\r\n]{0,40}"), 0..12),
            size in 1..200usize,
        ) {
            let (mut bytes, mut replies, mut messages) = (String::new(), String::new(), Vec::new());
            for (frame, channel, payload) in frames {
                if let Some(reply) = REPLIES.get(frame) {
                    bytes.push_str(reply);
                    replies.push_str(&without_channel(reply));
                } else {
                    let kind = if frame % 2 == 0 { "message" } else { "smessage" };
                    bytes.push_str(&message(kind, &channel, &payload));
                    messages.push((channel, Some(payload).filter(|payload| payload.len() <= MAX)));
                }
            }
            let (kept, taken) = read(bytes.as_bytes().chunks(size).map(<[u8]>::to_vec).collect());
            prop_assert_eq!(kept.unwrap(), replies);
            prop_assert_eq!(taken, messages);
        }

        #[test]
        fn any_bytes_are_read_without_a_panic(bytes: Vec<u8>, text in "[>*%|$+:\r\n0-9-]{0,60}") {
            let _ = read(vec![bytes]);
            let _ = read(vec![text.into_bytes()]);
        }
    }

    #[test]
    fn replies_are_bounded_in_length_and_depth() {
        let too_long = format!("${}\r\n", MAX_REPLY + 1);
        let without_end = "+".repeat(MAX_REPLY + 1);
        for bytes in
            [too_long, without_end, "*1\r\n".repeat(MAX_DEPTH + 2), "$18446744073709551615\r\n".into()]
        {
            let (kept, _) = read(vec![bytes.into_bytes()]);
            assert_eq!(kept.unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
    }

    #[tokio::test]
    async fn nothing_is_read_without_room_for_messages() {
        let received = Received::default();
        *received.room.lock().unwrap() = Some(1);
        let first = message("message", "c", &"x".repeat(MAX)).repeat(READ / 30);
        let second = message("message", "last", "");
        let pieces = Pieces(vec![first.as_bytes()[..READ].to_vec(), second.into_bytes()]);
        let mut stream = MessageStream::new(pieces, MAX, Duration::MAX, received.clone());
        let mut reply = [0];
        let taken = || received.messages.lock().unwrap().len();
        for _ in 0..3 {
            assert!(stream.read(&mut reply).now_or_never().is_none(), "it waits for its turn");
            assert!((1_000..=MESSAGES_PER_READ).contains(&taken()));
        }
    }

    #[tokio::test]
    async fn messages_are_late_until_a_read_empties_the_socket() {
        let received = Received::default();
        let one = message("message", "a 13th letter", &"x".repeat(MAX));
        let whole_read = one.repeat(READ / one.len()).into_bytes();
        assert_eq!(whole_read.len(), READ);
        let last = message("message", "last", "").into_bytes();
        let pieces = Pieces(vec![whole_read.clone(), whole_read, last]);
        let mut stream = MessageStream::new(pieces, MAX, Duration::ZERO, received.clone());
        assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
        let (messages, late) = (received.messages.lock().unwrap(), *received.late.lock().unwrap());
        let channels: Vec<_> = messages.iter().map(|(channel, _)| channel.as_str()).collect();
        let in_time = READ / one.len();
        assert_eq!((late, channels.len()), (in_time, in_time + 2));
        assert_eq!(channels[in_time..], ["caught up", "last"]);
    }
}
