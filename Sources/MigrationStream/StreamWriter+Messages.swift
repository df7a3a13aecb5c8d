extension StreamWriter {
    /// A command of the source.
    public mutating func command(_ command: ForwardCommand) {
        append([SectionType.command.rawValue])
        switch command {
        case .openReturnPath: head(CommandType.openReturnPath.rawValue, 0)
        case .ping(let value):
            head(CommandType.ping.rawValue, 4)
            be32(value)
        case .switchoverStart: head(CommandType.switchoverStart.rawValue, 0)
        case .begin(let migration, let features):
            head(CommandType.begin.rawValue, 24)
            identifier(migration)
            be64(features.rawValue)
        case .prepare: head(CommandType.prepare.rawValue, 0)
        case .commit: head(CommandType.commit.rawValue, 0)
        case .commitWithin(let attempt, let nanoseconds):
            head(CommandType.commitWithin.rawValue, 12)
            be32(attempt)
            be64(nanoseconds)
        case .retract(let attempt):
            head(CommandType.retract.rawValue, 4)
            be32(attempt)
        case .settle(let migration):
            head(CommandType.settle.rawValue, 16)
            identifier(migration)
        case .resume(let migration, let features):
            head(CommandType.resume.rawValue, 24)
            identifier(migration)
            be64(features.rawValue)
        case .root(let value):
            head(CommandType.root.rawValue, 8)
            be64(value)
        case .digests(let range, let values):
            head(CommandType.digests.rawValue, UInt16(DigestRange.byteCount + 8 * values.count))
            digestRange(range)
            for value in values { be64(value) }
        case .cancel(let reason): text(CommandType.cancel.rawValue, reason)
        case .postcopy(let command): self.command(command)
        case .other(let type, let length):
            head(type, UInt16(length))
            append(repeating: 0, count: length)
        }
    }

    /// A return path message of the destination.
    public mutating func message(_ message: ReturnPathMessage) {
        switch message {
        case .shut(let value):
            head(ReturnPathType.shut.rawValue, 4)
            be32(value)
        case .pong(let value):
            head(ReturnPathType.pong.rawValue, 4)
            be32(value)
        case .hello(let version, let features, let instance):
            head(ReturnPathType.hello.rawValue, 28)
            be32(version)
            be64(features.rawValue)
            identifier(instance)
        case .ready(let nanoseconds):
            head(ReturnPathType.ready.rawValue, 8)
            be64(nanoseconds)
        case .started(let nanoseconds):
            head(ReturnPathType.started.rawValue, 8)
            be64(nanoseconds)
        case .failure(let reason): text(ReturnPathType.failure.rawValue, reason)
        case .verdict(let verdict):
            head(ReturnPathType.verdict.rawValue, 1)
            append([verdict.rawValue])
        case .retracted(let attempt):
            head(ReturnPathType.retracted.rawValue, 4)
            be32(attempt)
        case .resumed: head(ReturnPathType.resumed.rawValue, 0)
        case .digestsWanted(let range):
            head(ReturnPathType.digestsWanted.rawValue, UInt16(DigestRange.byteCount))
            digestRange(range)
        case .switchoverAcknowledged: head(ReturnPathType.switchoverAcknowledged.rawValue, 0)
        case .postcopy(let message): self.message(message)
        }
    }

    private mutating func digestRange(_ range: DigestRange) {
        append([range.level.rawValue])
        be32(range.block)
        be64(range.first)
        be32(range.count)
    }

    mutating func head(_ type: UInt16, _ length: UInt16) {
        be16(type)
        be16(length)
    }

    /// A reason, cut to ``StreamLimit/reasonBytes`` at a character's boundary.
    private mutating func text(_ type: UInt16, _ reason: String) {
        var cut = Substring(reason)
        while cut.utf8.count > StreamLimit.reasonBytes { cut.removeLast() }
        head(type, UInt16(cut.utf8.count))
        append(Array(cut.utf8))
    }
}
