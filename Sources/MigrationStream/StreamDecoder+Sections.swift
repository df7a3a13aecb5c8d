// Everything at a section boundary.

extension StreamDecoder {
    mutating func section(_ buffer: inout ReceiveBuffer) throws(StreamError) -> Step {
        guard buffer.count >= 1 else { return .needMore }
        guard let type = SectionType(rawValue: buffer[0]) else { throw error(.sectionType(buffer[0])) }
        if isPackage, type != .full, type != .command { throw error(.postcopy(.sectionInPackage(type))) }
        switch type {
        case .endOfStream: return try endOfStream(&buffer)
        case .configuration: return try configuration(&buffer)
        case .command: return try command(&buffer)
        case .start, .full: return try sectionHead(type, &buffer)
        case .part, .end: return try sectionContinues(type, &buffer)
        case .subsection, .vmDescription, .footer: throw error(.sectionType(buffer[0]))
        }
    }

    private mutating func endOfStream(_ buffer: inout ReceiveBuffer) throws(StreamError) -> Step {
        if let open = sections.values.first(where: { !$0.ended }) {
            throw error(.sectionNotEnded(name: open.head.name))
        }
        advance(1, in: &buffer)
        state = .trailer
        return .item(.endOfStream)
    }

    // MARK: Configuration

    private mutating func configuration(_ buffer: inout ReceiveBuffer) throws(StreamError) -> Step {
        guard position == 8 else { throw error(.misplacedConfiguration) }
        guard buffer.count >= 5 else { return .needMore }
        let length = buffer.be32(1)
        guard length <= StreamLimit.machineNameBytes else {
            throw error(
                .nameTooLong(what: "the machine", byteCount: UInt64(length), limit: StreamLimit.machineNameBytes))
        }
        guard buffer.count >= 5 + Int(length) else { return .needMore }
        let machine = try name(buffer, at: 5, count: Int(length), of: "the machine")
        advance(5 + Int(length), in: &buffer)
        state = .configurationTail
        return .item(.configuration(machine: machine))
    }

    mutating func configurationTail(_ buffer: inout ReceiveBuffer) throws(StreamError) -> Step {
        guard buffer.count >= 1 else { return .needMore }
        guard buffer[0] == SectionType.subsection.rawValue else {
            state = .betweenSections
            return .again
        }
        guard buffer.count >= 2, buffer.count >= 6 + Int(buffer[1]) else { return .needMore }
        let nameLength = Int(buffer[1])
        let name = try name(buffer, at: 2, count: nameLength, of: "a configuration subsection")
        let version = buffer.be32(2 + nameLength)
        guard version == 1 else { throw error(.configurationSubsectionVersion(name: name, version)) }
        let body = 6 + nameLength
        let parsed: (ConfigurationSubsection, end: Int)?
        switch name {
        case "configuration/target-page-bits":
            parsed = buffer.count >= body + 4 ? (.targetPageBits(buffer.be32(body)), body + 4) : nil
        case "configuration/uuid":
            parsed = buffer.count >= body + 16 ? (.uuid(buffer.identifier(body)), body + 16) : nil
        case "configuration/capabilities":
            parsed = try capabilities(buffer, at: body)
            if case .capabilities(let names)? = parsed?.0, names.contains(MappedRAM.capability) { isMapped = true }
        default: throw error(.configurationSubsection(name: name))
        }
        guard let parsed else { return .needMore }
        advance(parsed.end, in: &buffer)
        return .item(.configurationSubsection(parsed.0))
    }

    private func capabilities(
        _ buffer: ReceiveBuffer, at start: Int
    ) throws(StreamError) -> (ConfigurationSubsection, end: Int)? {
        guard buffer.count >= start + 4 else { return nil }
        let count = buffer.be32(start)
        guard count <= StreamLimit.capabilities else {
            throw error(.tooMany(what: "capabilities", count: UInt64(count), limit: StreamLimit.capabilities))
        }
        var names: [String] = []
        var index = start + 4
        for _ in 0..<count {
            guard buffer.count > index, buffer.count >= index + 1 + Int(buffer[index]) else { return nil }
            let length = Int(buffer[index])
            names.append(try name(buffer, at: index + 1, count: length, of: "a capability"))
            index += 1 + length
        }
        return (.capabilities(names), index)
    }

    // MARK: Sections

    /// START or FULL.
    private mutating func sectionHead(_ type: SectionType, _ buffer: inout ReceiveBuffer) throws(StreamError) -> Step {
        guard buffer.count >= 6, buffer.count >= 14 + Int(buffer[5]) else { return .needMore }
        let nameLength = Int(buffer[5])
        let head = SectionHead(
            type: type, id: buffer.be32(1), name: try name(buffer, at: 6, count: nameLength, of: "a section"),
            instance: buffer.be32(6 + nameLength), version: buffer.be32(10 + nameLength))
        guard sections[head.id] == nil else { throw error(.repeatedSectionID(head.id, name: head.name)) }
        guard seenSections < StreamLimit.sections else {
            throw error(.tooMany(what: "sections", count: UInt64(seenSections) + 1, limit: StreamLimit.sections))
        }
        if head.name == Wire.ramSectionName {
            try checkRAM(head)
            begin(head, headBytes: 14 + nameLength, in: &buffer)
            state = .ramBlockList
            return .again
        }
        return try deviceSection(head, headBytes: 14 + nameLength, &buffer)
    }

    private func checkRAM(_ head: SectionHead) throws(StreamError) {
        guard head.type == .start else { throw error(.sectionNotInParts(name: head.name)) }
        guard head.version == Wire.ramSectionVersion else {
            throw error(.sectionVersion(name: head.name, got: head.version, known: Wire.ramSectionVersion))
        }
        guard head.instance == 0 else { throw error(.sectionInstance(name: head.name, head.instance)) }
        guard listTotal == 0 else { throw error(.repeatedSection(name: head.name)) }
    }

    private mutating func begin(_ head: SectionHead, headBytes: Int, in buffer: inout ReceiveBuffer) {
        sections[head.id] = OpenSection(head: head, ended: head.type == .full)
        seenSections += 1
        sectionID = head.id
        sectionType = head.type
        advance(headBytes, in: &buffer)
    }

    private mutating func deviceSection(
        _ head: SectionHead, headBytes: Int, _ buffer: inout ReceiveBuffer
    ) throws(StreamError) -> Step {
        guard head.type == .full, let known = catalogue.version(of: head.name), known == head.version,
            let layout = catalogue.layout(of: head.name)
        else {
            if describes { return infer(head, headBytes: headBytes, in: &buffer) }
            throw error(unusable(head))
        }
        let bodyStart: Int
        let length: Int
        switch layout {
        case .fixed(let byteCount): (bodyStart, length) = (headBytes, byteCount)
        case .lengthPrefixed(let maximum):
            guard buffer.count >= headBytes + 4 else { return .needMore }
            let announced = buffer.be32(headBytes)
            guard announced <= maximum else {
                throw error(.sectionTooLong(name: head.name, byteCount: UInt64(announced), limit: maximum))
            }
            (bodyStart, length) = (headBytes + 4, Int(announced))
        }
        let end = bodyStart + length
        guard buffer.count >= end + 1 else { return .needMore }
        guard buffer[end] == SectionType.footer.rawValue else {
            if describes { return infer(head, headBytes: headBytes, in: &buffer) }
            guard let cause = notFooter(head, buffer, at: end) else { return .needMore }
            throw error(cause)
        }
        guard buffer.count >= end + 5 else { return .needMore }
        guard buffer.be32(end + 1) == head.id else {
            throw error(.footerOfOther(section: head.name, id: head.id, got: buffer.be32(end + 1)))
        }
        let body = buffer.copy(bodyStart..<end)
        begin(head, headBytes: end + 5, in: &buffer)
        return .item(.device(head, body: body))
    }

    private func unusable(_ head: SectionHead) -> StreamError.Cause {
        guard let known = catalogue.version(of: head.name) else {
            return .unknownSection(name: head.name, instance: head.instance)
        }
        if head.type == .start { return .sectionInParts(name: head.name) }
        return .sectionVersion(name: head.name, got: head.version, known: known)
    }

    private mutating func infer(_ head: SectionHead, headBytes: Int, in buffer: inout ReceiveBuffer) -> Step {
        begin(head, headBytes: headBytes, in: &buffer)
        inferredHead = head
        inferredBytes = 0
        state = .inference
        return .again
    }

    /// Why there is no footer, or nil when bytes are missing to name the subsection that stands there.
    private func notFooter(_ head: SectionHead, _ buffer: ReceiveBuffer, at end: Int) -> StreamError.Cause? {
        let missing = StreamError.Cause.missingFooter(section: head.name, got: buffer[end])
        guard buffer[end] == SectionType.subsection.rawValue else { return missing }
        guard buffer.count >= end + 2, buffer.count >= end + 2 + Int(buffer[end + 1]) else { return nil }
        let length = Int(buffer[end + 1])
        guard length > 0, let name = buffer.text((end + 2)..<(end + 2 + length)) else { return missing }
        return .subsection(section: head.name, name: name)
    }

    /// PART or END.
    private mutating func sectionContinues(
        _ type: SectionType, _ buffer: inout ReceiveBuffer
    ) throws(StreamError) -> Step {
        guard buffer.count >= 5 else { return .needMore }
        let id = buffer.be32(1)
        guard let open = sections[id], open.head.type == .start else {
            throw error(.unknownSectionID(id, type: type))
        }
        guard !open.ended else { throw error(.sectionAlreadyEnded(name: open.head.name)) }
        sections[id]?.ended = type == .end
        sectionID = id
        sectionType = type
        advance(5, in: &buffer)
        if open.head.name == Wire.ramSectionName {
            state = .records
            return .item(.ramRound(final: type == .end))
        }
        inferredHead = open.head
        inferredBytes = 0
        state = .inference
        return .again
    }
}

extension ReceiveBuffer {
    func identifier(_ index: Int) -> MigrationIdentifier {
        MigrationIdentifier(high: be64(index), low: be64(index + 8))
    }
}
