//! Random commands of several users, here and in a small model without a database: at the end every user's feed, list of
//! conversations, counts and pages are what the model says.

use std::fmt::Write as _;

use rand::{RngExt, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use serde_json::{Value, json};
use sqlx::PgPool;
use testkit::http::Answer;

use crate::support::{ApiUser, App, assert_counts_agree};

const USERS: usize = 5;
const COMMANDS: usize = 150;
const SEEDS: u64 = 12;
const LARGEST_GROUP: usize = 4;

struct Message {
    id: String,
    sender: usize,
    /// Empty when it was deleted.
    text: String,
    hidden_from: Option<usize>,
    /// Who blocked the sender when they edited it: it looks deleted to them.
    text_hidden_from: Option<usize>,
    is_deleted: bool,
}

impl Message {
    fn text_for(&self, reader: usize) -> &str {
        if self.text_hidden_from == Some(reader) { "" } else { &self.text }
    }
}

struct Member {
    user: usize,
    is_owner: bool,
    /// Messages up to this number are from before they joined.
    joined: usize,
    /// The number of the last message that they see; 0: none.
    last: usize,
    read: usize,
    /// The place in their feed that orders their list.
    listed: Option<usize>,
}

struct Conversation {
    id: String,
    /// Of a group.
    title: Option<String>,
    members: Vec<Member>,
    messages: Vec<Message>,
}

impl Conversation {
    fn member(&self, user: usize) -> Option<&Member> {
        self.members.iter().find(|member| member.user == user)
    }

    fn member_mut(&mut self, user: usize) -> Option<&mut Member> {
        self.members.iter_mut().find(|member| member.user == user)
    }

    /// Numbers are from 1.
    fn message(&self, number: usize) -> Option<&Message> {
        self.messages.get(number.checked_sub(1)?)
    }

    fn id_of(&self, number: usize) -> Value {
        self.message(number).map_or(Value::Null, |message| json!(message.id))
    }

    /// The numbers of the messages that a user sees, up to `last`.
    fn visible(&self, user: usize, last: usize) -> Vec<usize> {
        let Some(member) = self.member(user) else { return Vec::new() };
        let range = member.joined + 1..=last.min(self.messages.len());
        range.filter(|number| self.messages[number - 1].hidden_from != Some(user)).collect()
    }

    fn unread(&self, user: usize, last: usize) -> usize {
        let Some(member) = self.member(user) else { return 0 };
        let unread = |number: &usize| {
            let message = &self.messages[number - 1];
            *number > member.read && message.sender != user && !message.is_deleted
        };
        self.visible(user, last).iter().filter(|number| unread(number)).count()
    }

    /// As REST shows it, or as an event of that time does: with the messages up to `last`.
    fn seen_by(&self, user: usize, last: usize, count: usize) -> Value {
        let Some(member) = self.member(user) else {
            return json!({ "id": self.id, "kind": "group", "title": null, "participantCount": count, "role": "member",
                "lastMessage": null, "unreadCount": 0, "lastReadMessageId": null });
        };
        let message = self.visible(user, last).last().map(|number| &self.messages[number - 1]);
        json!({
            "id": self.id,
            "kind": if self.title.is_some() { "group" } else { "direct" },
            "title": self.title,
            "participantCount": count,
            "role": if member.is_owner { "owner" } else { "member" },
            "lastMessage": message.map(|message| json!({ "id": message.id, "content": message.text_for(user) })),
            "unreadCount": self.unread(user, last),
            "hasUnreadMessages": self.unread(user, last) > 0,
            "lastReadMessageId": if member.read <= last { self.id_of(member.read) } else { Value::Null },
        })
    }
}

/// What an event is about; its text is made when it is compared, since replays tell the state of then.
enum Event {
    Message { conversation: usize, number: usize },
    Edited { conversation: usize, number: usize },
    Deleted { conversation: usize, number: usize },
    Created { conversation: usize, number: usize, count: usize },
    Updated { conversation: usize, number: usize, count: usize },
    Read { conversation: usize, number: usize, unread: usize },
    Receipt { conversation: usize, user: usize, number: usize },
    Joined { conversation: usize, user: usize },
    Left { conversation: usize, user: usize },
    Role { conversation: usize, user: usize, is_owner: bool },
}

#[derive(Default)]
struct Model {
    conversations: Vec<Conversation>,
    feeds: [Vec<Event>; USERS],
    /// Who blocks whom.
    blocks: Vec<(usize, usize)>,
    groups_made: usize,
}

impl Model {
    fn blocks(&self, blocker: usize, blocked: usize) -> bool {
        self.blocks.contains(&(blocker, blocked))
    }

    /// Returns the event's place in the feed.
    fn tell(&mut self, user: usize, event: Event) -> usize {
        self.feeds[user].push(event);
        self.feeds[user].len()
    }

    fn post(&mut self, conversation: usize, sender: usize, id: String, text: String) {
        let group = self.conversations[conversation].title.is_some();
        let users: Vec<usize> =
            self.conversations[conversation].members.iter().map(|member| member.user).collect();
        let hidden_from = users.iter().copied().find(|user| !group && self.blocks(*user, sender));
        let message = Message { id, sender, text, hidden_from, text_hidden_from: None, is_deleted: false };
        self.conversations[conversation].messages.push(message);
        let number = self.conversations[conversation].messages.len();
        for user in users.into_iter().filter(|user| Some(*user) != hidden_from) {
            let place = self.tell(user, Event::Message { conversation, number });
            let member = self.conversations[conversation].member_mut(user).unwrap();
            (member.last, member.listed) = (number, Some(place));
        }
    }

    fn read(&mut self, conversation: usize, reader: usize, to: usize) {
        let member = self.conversations[conversation].member_mut(reader).unwrap();
        let before = member.read;
        if to <= before {
            return;
        }
        member.read = to;
        let here = &self.conversations[conversation];
        let unread = here.unread(reader, usize::MAX);
        let mut told = Vec::new();
        for member in here.members.iter().filter(|member| member.user != reader) {
            // In a group everybody who was there; of two, as far as the other one sees, unless they block the reader.
            let number = if here.title.is_some() { to } else { to.min(member.last) };
            let blocks = here.title.is_none() && self.blocks(member.user, reader);
            if number > before.max(member.joined) && !blocks {
                told.push((member.user, number));
            }
        }
        self.tell(reader, Event::Read { conversation, number: to, unread });
        for (user, number) in told {
            self.tell(user, Event::Receipt { conversation, user: reader, number });
        }
    }

    /// All who can see a message.
    fn tell_viewers(
        &mut self,
        conversation: usize,
        number: usize,
        not: Option<usize>,
        event: impl Fn() -> Event,
    ) {
        let here = &self.conversations[conversation];
        let hidden_from = here.messages[number - 1].hidden_from;
        let viewers = here.members.iter().filter(|member| member.joined < number).map(|member| member.user);
        let viewers: Vec<usize> =
            viewers.filter(|user| Some(*user) != hidden_from && Some(*user) != not).collect();
        for user in viewers {
            self.tell(user, event());
        }
    }

    fn tell_members(&mut self, conversation: usize, event: impl Fn() -> Event) {
        let users: Vec<usize> =
            self.conversations[conversation].members.iter().map(|member| member.user).collect();
        for user in users {
            self.tell(user, event());
        }
    }

    fn leave(&mut self, conversation: usize, user: usize) {
        self.tell_members(conversation, || Event::Left { conversation, user });
        let here = &mut self.conversations[conversation];
        here.members.retain(|member| member.user != user);
        // They stand in the order of joining.
        if !here.members.iter().any(|member| member.is_owner) && !here.members.is_empty() {
            here.members[0].is_owner = true;
            let user = here.members[0].user;
            self.tell_members(conversation, || Event::Role { conversation, user, is_owner: true });
        }
    }

    fn rendered(&self, users: &[ApiUser], reader: usize, event: &Event) -> (&'static str, Value) {
        let id = |conversation: &usize| json!(self.conversations[*conversation].id);
        let role = |is_owner: &bool| if *is_owner { "owner" } else { "member" };
        match event {
            Event::Message { conversation, number } => {
                let here = &self.conversations[*conversation];
                let message = here.message(*number).unwrap();
                let visible = here.member(reader).is_some_and(|member| member.joined < *number);
                let mine = message.sender == reader;
                let text = if visible { message.text_for(reader) } else { "" };
                let data =
                    json!({ "id": message.id, "content": text, "conversationId": here.id, "mine": mine });
                (if mine { "message.sent" } else { "message" }, data)
            }
            Event::Edited { conversation, number } => {
                let (_, data) = self.rendered(
                    users,
                    reader,
                    &Event::Message { conversation: *conversation, number: *number },
                );
                ("message.updated", data)
            }
            Event::Deleted { conversation, number } => {
                let here = &self.conversations[*conversation];
                let unread = here.unread(reader, usize::MAX);
                let id = &here.message(*number).unwrap().id;
                ("message.deleted", json!({ "id": id, "conversationId": here.id, "unreadCount": unread }))
            }
            Event::Created { conversation, number, count } => {
                ("conversation.created", self.conversations[*conversation].seen_by(reader, *number, *count))
            }
            Event::Updated { conversation, number, count } => {
                ("conversation.updated", self.conversations[*conversation].seen_by(reader, *number, *count))
            }
            Event::Read { conversation, number, unread } => (
                "conversation.read",
                json!({ "conversationId": id(conversation), "lastReadMessageId": self.conversations[*conversation].id_of(*number),
                    "unreadCount": unread }),
            ),
            Event::Receipt { conversation, user, number } => (
                "receipt.read",
                json!({ "conversationId": id(conversation), "userId": users[*user].id,
                    "lastReadMessageId": self.conversations[*conversation].id_of(*number) }),
            ),
            Event::Joined { conversation, user } => (
                "participant.joined",
                json!({ "conversationId": id(conversation), "user": { "id": users[*user].id }, "role": "member" }),
            ),
            Event::Left { conversation, user } => {
                ("participant.left", json!({ "conversationId": id(conversation), "userId": users[*user].id }))
            }
            Event::Role { conversation, user, is_owner } => (
                "participant.updated",
                json!({ "conversationId": id(conversation), "userId": users[*user].id, "role": role(is_owner) }),
            ),
        }
    }
}

/// Whether `actual` has all that `expected` says.
fn agrees(expected: &Value, actual: &Value) -> bool {
    match (expected, actual) {
        (Value::Object(expected), Value::Object(actual)) => {
            expected.iter().all(|(name, value)| actual.get(name).is_some_and(|actual| agrees(value, actual)))
        }
        (Value::Array(expected), Value::Array(actual)) => {
            expected.len() == actual.len()
                && expected.iter().zip(actual).all(|(expected, actual)| agrees(expected, actual))
        }
        (expected, actual) => expected == actual,
    }
}

/// One test's users, their service, and the model of both.
struct World {
    app: App,
    users: Vec<ApiUser>,
    model: Model,
    random: StdRng,
    /// For the report of a failure.
    commands: String,
}

impl World {
    fn note(&mut self, command: std::fmt::Arguments<'_>) {
        writeln!(self.commands, "  {command}").unwrap();
    }

    fn check(&self, answer: &Answer, status: u16) {
        assert_eq!(answer.status, status, "{} after\n{}", answer.text(), self.commands);
    }

    fn pick(&mut self) -> usize {
        self.random.random_range(0..USERS)
    }

    /// A conversation of two or a group, also one of others.
    fn pick_conversation(&mut self, group: Option<bool>) -> Option<usize> {
        let fits = |index: &usize| {
            group.is_none_or(|group| self.model.conversations[*index].title.is_some() == group)
        };
        let all: Vec<usize> = (0..self.model.conversations.len()).filter(fits).collect();
        all.choose(&mut self.random).copied()
    }

    /// Mostly somebody who is in it.
    fn pick_for(&mut self, conversation: usize) -> usize {
        let members: Vec<usize> =
            self.model.conversations[conversation].members.iter().map(|member| member.user).collect();
        let member = members.choose(&mut self.random).copied().filter(|_| self.random.random_ratio(4, 5));
        member.unwrap_or_else(|| self.random.random_range(0..USERS))
    }

    async fn step(&mut self) {
        match self.random.random_range(0..100) {
            0..5 => self.start().await,
            5..9 => self.create_group().await,
            9..14 => self.block().await,
            14..38 => self.post().await,
            38..56 => self.read().await,
            56..61 => self.edit().await,
            61..66 => self.delete().await,
            66..70 => self.rename().await,
            70..84 => self.add().await,
            84..90 => self.set_role().await,
            _ => self.remove().await,
        }
    }

    async fn start(&mut self) {
        let (user, other) = (self.pick(), self.pick());
        self.note(format_args!("{user} starts with {other}"));
        let answer = self.users[user].start_conversation(&self.users[other].name).send().await.unwrap();
        if user == other {
            return self.check(&answer, 403);
        }
        let model = &mut self.model;
        let exists = model.conversations.iter().any(|conversation| {
            conversation.title.is_none()
                && [user, other].iter().all(|user| conversation.member(*user).is_some())
        });
        if exists {
            return self.check(&answer, 302);
        }
        let member = |user| Member { user, is_owner: false, joined: 0, last: 0, read: 0, listed: None };
        let conversation = model.conversations.len();
        model.conversations.push(Conversation {
            id: answer.json()["id"].as_str().unwrap_or_default().to_owned(),
            title: None,
            members: vec![member(user), member(other)],
            messages: Vec::new(),
        });
        for receiver in [user, other] {
            if !model.blocks(receiver, user) {
                model.tell(receiver, Event::Created { conversation, number: 0, count: 2 });
            }
        }
        self.check(&answer, 201);
    }

    async fn create_group(&mut self) {
        let user = self.pick();
        let mut members = vec![user];
        for _ in 0..self.random.random_range(0..4) {
            members.push(self.pick());
        }
        self.note(format_args!("{user} makes a group of {members:?}"));
        let names: Vec<&str> = members[1..].iter().map(|user| self.users[*user].name.as_str()).collect();
        self.model.groups_made += 1;
        let title = format!("group {}", self.model.groups_made);
        let answer = self.users[user].create_group(&title, &names).send().await.unwrap();
        members[1..].sort_unstable();
        members.dedup();
        let others: Vec<usize> = members.iter().copied().filter(|other| *other != user).collect();
        let model = &mut self.model;
        let addable = others.iter().all(|other| !model.blocks(user, *other) && !model.blocks(*other, user));
        if others.len() >= LARGEST_GROUP || !addable {
            return self.check(&answer, 422);
        }
        let (conversation, count) = (model.conversations.len(), others.len() + 1);
        // All join at one time: then their ids order them.
        let mut all = [vec![user], others].concat();
        all.sort_unstable();
        let members = all.iter().map(|member| Member {
            user: *member,
            is_owner: *member == user,
            joined: 0,
            last: 0,
            read: 0,
            listed: Some(model.feeds[*member].len() + 1),
        });
        let members = members.collect();
        let id = answer.json()["id"].as_str().unwrap_or_default().to_owned();
        model.conversations.push(Conversation { id, title: Some(title), members, messages: Vec::new() });
        model.tell_members(conversation, || Event::Created { conversation, number: 0, count });
        self.check(&answer, 201);
    }

    async fn block(&mut self) {
        let (user, other, blocked) = (self.pick(), self.pick(), self.random.random_ratio(1, 3));
        if user == other {
            return;
        }
        self.note(format_args!("{user} blocks {other}: {blocked}"));
        let path = format!("/api/blocks/{}", self.users[other].id);
        self.users[user].call(if blocked { "PUT" } else { "DELETE" }, &path).expect(204).await;
        self.model.blocks.retain(|block| *block != (user, other));
        if blocked {
            self.model.blocks.push((user, other));
        }
    }

    async fn post(&mut self) {
        let Some(conversation) = self.pick_conversation(None) else { return };
        let user = self.pick_for(conversation);
        self.note(format_args!("{user} posts to {conversation}"));
        let here = &self.model.conversations[conversation];
        let text = format!("{} by {user}", here.messages.len() + 1);
        let answer = self.users[user].post_message(&here.id, &text).send().await.unwrap();
        if here.member(user).is_none() {
            return self.check(&answer, 404);
        }
        self.check(&answer, 201);
        self.model.post(conversation, user, crate::support::text(&answer.json()["id"]), text);
    }

    /// All, or a page before some message.
    async fn read(&mut self) {
        let Some(conversation) = self.pick_conversation(None) else { return };
        let user = self.pick_for(conversation);
        let here = &self.model.conversations[conversation];
        let visible = here.visible(user, usize::MAX);
        let before = visible.choose(&mut self.random).copied().filter(|_| self.random.random());
        self.commands += &format!("  {user} reads {conversation}, before {before:?}\n");
        let answer = match before {
            None => self.users[user].read_messages(&here.id).send().await.unwrap(),
            Some(before) => {
                let query = format!("?limit=2&before={}", here.messages[before - 1].id);
                self.users[user].messages(&here.id, &query).send().await.unwrap()
            }
        };
        let Some(member) = here.member(user) else { return self.check(&answer, 404) };
        self.check(&answer, if before.is_some() { 200 } else { 204 });
        let to = match before {
            None => member.last,
            Some(before) => visible.iter().copied().filter(|number| *number < before).max().unwrap_or(0),
        };
        self.model.read(conversation, user, to);
    }

    /// Some message of some conversation, by its number.
    fn pick_message(&mut self) -> Option<(usize, usize, usize)> {
        let conversation = self.pick_conversation(None)?;
        let user = self.pick_for(conversation);
        let count = self.model.conversations[conversation].messages.len();
        (count > 0).then(|| (conversation, user, self.random.random_range(1..=count)))
    }

    async fn edit(&mut self) {
        let Some((conversation, user, number)) = self.pick_message() else { return };
        let text = format!("edited {}", self.random.random_range(0..3));
        self.note(format_args!("{user} edits {number} of {conversation}: {text}"));
        let model = &mut self.model;
        let here = &model.conversations[conversation];
        let message = &here.messages[number - 1];
        let answer = self.users[user].edit_message(&here.id, &message.id, &text).send().await.unwrap();
        let status = match here.visible(user, usize::MAX).contains(&number) {
            true if message.is_deleted => 404,
            true if message.sender != user => 403,
            true => 200,
            false => 404,
        };
        if status == 200 && message.text != text {
            let is_direct = here.title.is_none();
            let blocker = here
                .members
                .iter()
                .map(|member| member.user)
                .find(|other| is_direct && model.blocks(*other, user));
            let message = &mut model.conversations[conversation].messages[number - 1];
            (message.text, message.text_hidden_from) = (text, blocker);
            model.tell_viewers(conversation, number, blocker, || Event::Edited { conversation, number });
        }
        self.check(&answer, status);
    }

    async fn delete(&mut self) {
        let Some((conversation, user, number)) = self.pick_message() else { return };
        self.note(format_args!("{user} deletes {number} of {conversation}"));
        let model = &mut self.model;
        let here = &model.conversations[conversation];
        let message = &here.messages[number - 1];
        let answer = self.users[user].delete_message(&here.id, &message.id).send().await.unwrap();
        let status = match here.visible(user, usize::MAX).contains(&number) {
            true if message.sender != user && !here.member(user).is_some_and(|member| member.is_owner) => 403,
            true => 204,
            false => 404,
        };
        if status == 204 && !message.is_deleted {
            let message = &mut model.conversations[conversation].messages[number - 1];
            (message.text, message.text_hidden_from, message.is_deleted) = (String::new(), None, true);
            model.tell_viewers(conversation, number, None, || Event::Deleted { conversation, number });
        }
        self.check(&answer, status);
    }

    async fn rename(&mut self) {
        let Some(conversation) = self.pick_conversation(None) else { return };
        let user = self.pick_for(conversation);
        let title = format!("title {}", self.random.random_range(0..3));
        self.note(format_args!("{user} renames {conversation} to {title}"));
        let here = &mut self.model.conversations[conversation];
        let answer = self.users[user].rename(&here.id, &title).send().await.unwrap();
        match (here.member(user), &here.title) {
            (None, _) => return self.check(&answer, 404),
            (Some(_), None) => return self.check(&answer, 422),
            (Some(member), _) if !member.is_owner => return self.check(&answer, 403),
            (_, Some(same)) if *same == title => return self.check(&answer, 200),
            _ => here.title = Some(title),
        }
        let (number, count) = (here.messages.len(), here.members.len());
        self.model.tell_members(conversation, || Event::Updated { conversation, number, count });
        self.check(&answer, 200);
    }

    async fn add(&mut self) {
        let Some(conversation) = self.pick_conversation(Some(true)) else { return };
        let (user, who) = (self.pick_for(conversation), self.pick());
        self.note(format_args!("{user} adds {who} to {conversation}"));
        let model = &mut self.model;
        let here = &model.conversations[conversation];
        let answer = self.users[user].add(&here.id, &self.users[who].name).send().await.unwrap();
        let in_a_block = model.blocks(user, who) || model.blocks(who, user);
        let status = match here.member(user) {
            None => 404,
            Some(member) if !member.is_owner => 403,
            Some(_) if here.member(who).is_some() => 200,
            Some(_) if in_a_block || here.members.len() >= LARGEST_GROUP => 422,
            Some(_) => 201,
        };
        if status == 201 {
            let (number, count) = (here.messages.len(), here.members.len() + 1);
            let place = model.tell(who, Event::Created { conversation, number, count });
            let member =
                Member { user: who, is_owner: false, joined: number, last: 0, read: 0, listed: Some(place) };
            model.conversations[conversation].members.push(member);
            model.tell_members(conversation, || Event::Joined { conversation, user: who });
        }
        self.check(&answer, status);
    }

    async fn set_role(&mut self) {
        let Some(conversation) = self.pick_conversation(Some(true)) else { return };
        let (user, who) = (self.pick_for(conversation), self.pick_for(conversation));
        let is_owner = self.random.random();
        let role = if is_owner { "owner" } else { "member" };
        self.note(format_args!("{user} makes {who} {role} of {conversation}"));
        let here = &mut self.model.conversations[conversation];
        let answer = self.users[user].set_role(&here.id, &self.users[who], role).send().await.unwrap();
        let owners = here.members.iter().filter(|member| member.is_owner).count();
        let by_owner = here.member(user).map(|member| member.is_owner);
        let status = match (by_owner, here.member_mut(who)) {
            (None, _) | (_, None) => 404,
            (Some(false), _) => 403,
            (_, Some(member)) if member.is_owner == is_owner => 200,
            (_, Some(_)) if owners == 1 && !is_owner => 422,
            (_, Some(member)) => {
                member.is_owner = is_owner;
                self.model.tell_members(conversation, || Event::Role { conversation, user: who, is_owner });
                200
            }
        };
        self.check(&answer, status);
    }

    async fn remove(&mut self) {
        let Some(conversation) = self.pick_conversation(Some(true)) else { return };
        let user = self.pick_for(conversation);
        let who = if self.random.random() { user } else { self.pick_for(conversation) };
        self.note(format_args!("{user} removes {who} from {conversation}"));
        let here = &self.model.conversations[conversation];
        let answer = self.users[user].remove(&here.id, &self.users[who]).send().await.unwrap();
        let status = match (here.member(user), here.member(who)) {
            (None, _) | (_, None) => 404,
            (Some(member), _) if who != user && !member.is_owner => 403,
            _ => 204,
        };
        self.check(&answer, status);
        if status == 204 {
            self.model.leave(conversation, who);
        }
    }

    async fn compare(&self) {
        for (user, client) in self.users.iter().enumerate() {
            let feed = self.app.feed(client.id).await;
            let expected: Vec<_> = self.model.feeds[user]
                .iter()
                .map(|event| self.model.rendered(&self.users, user, event))
                .collect();
            for (seq, (expected, actual)) in expected.iter().zip(&feed).enumerate() {
                let same = expected.0 == actual.0 && agrees(&expected.1, &actual.1);
                assert!(
                    same,
                    "user {user}, event {}: {actual:?}, expected {expected:?} after\n{}",
                    seq + 1,
                    self.commands
                );
            }
            assert_eq!(feed.len(), expected.len(), "user {user}: {feed:?} after\n{}", self.commands);

            let mut mine: Vec<&Conversation> = self.model.conversations.iter().collect();
            mine.retain(|here| here.member(user).is_some_and(|member| member.listed.is_some()));
            mine.sort_by_key(|here| std::cmp::Reverse(here.member(user).unwrap().listed));
            let list: Vec<Value> =
                mine.iter().map(|here| here.seen_by(user, usize::MAX, here.members.len())).collect();
            let actual = client.conversations("").expect(200).await.json();
            assert!(
                agrees(&json!(list[..list.len().min(25)]), &actual),
                "user {user}: {actual}, expected {} after\n{}",
                json!(list),
                self.commands
            );
            let total: usize =
                self.model.conversations.iter().map(|here| here.unread(user, usize::MAX)).sum();
            assert_eq!(
                client.auth_user().expect(200).await.json()["unreadTotal"],
                total,
                "user {user} after\n{}",
                self.commands
            );

            for here in &self.model.conversations {
                let answer = client.messages(&here.id, "?markRead=false&limit=100").send().await.unwrap();
                let Some(_) = here.member(user) else {
                    assert_eq!(answer.status, 404);
                    continue;
                };
                let visible = here.visible(user, usize::MAX).into_iter().rev();
                let expected: Vec<Value> = visible
                    .map(|number| &here.messages[number - 1])
                    .map(|message| json!({ "id": message.id, "content": message.text_for(user) }))
                    .collect();
                assert!(
                    agrees(&json!(expected), &answer.json()),
                    "user {user}: {} after\n{}",
                    answer.text(),
                    self.commands
                );
            }
        }
    }
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn random_commands_have_the_models_effects(pool: PgPool) {
    let first: u64 =
        std::env::var("MODEL_SEED").map_or_else(|_| rand::random(), |seed| seed.parse().unwrap());
    let seeds: u64 = std::env::var("MODEL_SEEDS").map_or(SEEDS, |seeds| seeds.parse().unwrap());
    let mut app = App::with(&pool, |config| config.largest_group = LARGEST_GROUP).await;
    for seed in (0..seeds).map(|nth| first.wrapping_add(nth)) {
        println!("MODEL_SEED={seed}");
        let mut users = Vec::new();
        for user in 0..USERS {
            users.push(app.user(&pool, &format!("user{user}-{seed}")).await);
        }
        let random = StdRng::seed_from_u64(seed);
        let mut world = World { app, users, model: Model::default(), random, commands: String::new() };
        for _ in 0..COMMANDS {
            world.step().await;
        }
        world.compare().await;
        assert_counts_agree(&pool).await;
        app = world.app;
    }
    app.stop().await;
}
