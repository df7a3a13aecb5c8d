/// What a migration stream holds, of Godwit or of QEMU: fed piece by piece, keeps no page contents.
///
/// Bodies of device sections that the catalogue does not know are measured by finding their footer, and marked as
/// inferred.
public struct StreamSummary: Sendable {
    public struct Block: Hashable, Sendable {
        public let name: String
        public let length: UInt64
        /// Page records with contents, and such of zero pages; a page sent in two rounds counts twice.
        public internal(set) var dataPages: UInt64 = 0
        public internal(set) var zeroPages: UInt64 = 0
        /// Pages sent as their difference to an earlier version (xbzrle).
        public internal(set) var deltaPages: UInt64 = 0
        /// Where its pages stand, if they have places of their own in the file, and how many its bitmap marks.
        public internal(set) var region: MappedRegion?
        public internal(set) var markedPages: UInt64 = 0
    }

    public struct Section: Hashable, Sendable {
        public let id: UInt32
        public let name: String
        public let instance: UInt32
        public let version: UInt32
        /// Bytes on the wire, heads and footers included.
        public internal(set) var bytes: UInt64 = 0
        /// Bytes of the body; for RAM those of all records, pages included.
        public internal(set) var bodyBytes: UInt64 = 0
        /// PART and END sections: zero for a section that comes whole.
        public internal(set) var rounds = 0
        /// The END section came, or the section is whole.
        public internal(set) var ended = false
        /// The length was found by looking for the footer.
        public internal(set) var inferred = false
    }

    public struct Command: Hashable, Sendable {
        public let position: UInt64
        public let command: ForwardCommand
    }

    /// Commands kept; more are only counted.
    public static let commandsKept = 256

    public private(set) var machine: String?
    public private(set) var configuration: [ConfigurationSubsection] = []
    public private(set) var blocks: [Block] = []
    public private(set) var sections: [Section] = []
    public private(set) var commands: [Command] = []
    public private(set) var commandCount = 0
    /// The JSON text behind EOF.
    public private(set) var vmDescription: String?
    /// The source said that it sent everything.
    public private(set) var isComplete = false

    private var decoder: StreamDecoder
    private var buffer = ReceiveBuffer()
    private var descriptionBytes: [UInt8]?
    private var sectionIndex: [UInt32: Int] = [:]
    private var sectionStart: UInt64 = 0
    /// Those of the list that is being read; and the one whose place is.
    private var regions: [MappedRegion] = []
    private var markedPages: [UInt64] = []
    private var isInRegion = false

    public init(catalogue: SectionCatalogue = SectionCatalogue()) {
        decoder = StreamDecoder(.describe(catalogue: catalogue))
    }

    /// Bytes of the stream understood so far.
    public var byteCount: UInt64 { decoder.position }

    /// Takes the next piece of the stream.
    ///
    /// - Throws: what makes the bytes no migration stream; the summary then holds what came before.
    public mutating func feed(_ piece: some Collection<UInt8>) throws(StreamError) {
        buffer.append(piece)
        try drain()
    }

    /// Bytes that may be left out here, the pages of a block in their places: see `skip`.
    public var skippableBytes: UInt64 {
        guard isInRegion, buffer.count == 0, let region = regions.last,
            UInt64(decoder.payloadBytes) <= region.end - region.bitmapOffset - region.bitmapBytes
        else { return 0 }
        return UInt64(decoder.payloadBytes)
    }

    /// The next bytes of the stream are not fed. - Precondition: no more than `skippableBytes`.
    public mutating func skip(_ count: UInt64) {
        precondition(count <= skippableBytes, "StreamSummary: what is skipped matters")
        decoder.payloadConsumed(Int(count))
    }

    /// The stream is over.
    ///
    /// - Throws: also when it is cut off.
    public mutating func finish() throws(StreamError) {
        decoder.inputHasEnded = true
        try drain()
        try decoder.checkEnd(buffer)
        settleDescription()
    }

    private mutating func drain() throws(StreamError) {
        while true {
            if decoder.payloadBytes > 0 {
                let taken = min(decoder.payloadBytes, buffer.count)
                if descriptionBytes != nil { descriptionBytes?.append(contentsOf: buffer.copy(0..<taken)) }
                if isInRegion { countMarks(taken) }
                buffer.consume(taken)
                decoder.payloadConsumed(taken)
                if decoder.payloadBytes > 0 { return }
                continue
            }
            settleDescription()
            guard let item = try decoder.next(from: &buffer) else { return }
            take(item)
        }
    }

    /// The next bytes of a block's place, of which the first are its bitmap.
    private mutating func countMarks(_ count: Int) {
        guard let region = regions.last else { return }
        let start = region.end - UInt64(decoder.payloadBytes)
        let bitmap = region.bitmapOffset..<region.bitmapOffset + region.bitmapBytes
        let these = bitmap.clamped(to: start..<start + UInt64(count))
        guard !these.isEmpty else { return }
        let bytes = buffer.copy(Int(these.lowerBound - start)..<Int(these.upperBound - start))
        markedPages[markedPages.count - 1] += bytes.reduce(0) { $0 + UInt64($1.nonzeroBitCount) }
    }

    private mutating func settleDescription() {
        guard let bytes = descriptionBytes else { return }
        vmDescription = String(decoding: bytes, as: UTF8.self)
        descriptionBytes = nil
    }

    private mutating func take(_ item: StreamItem) {
        switch item {
        case .header: break
        case .configuration(let name): machine = name
        case .configurationSubsection(let subsection): configuration.append(subsection)
        case .mappedBlock(let region):
            isInRegion = true
            regions.append(region)
            markedPages.append(0)
            return
        case .ramSetup(let listed):
            isInRegion = false
            blocks = listed.map { Block(name: $0.name, length: $0.length) }
            for (region, marked) in zip(regions, markedPages) where blocks.indices.contains(region.block) {
                blocks[region.block].region = region
                blocks[region.block].markedPages = marked
            }
            return
        case .ramRound, .multifdFlush, .ramRecordsEnded: return
        case .page(let block, _):
            blocks[block].dataPages += 1
            return
        case .zeroPage(let block, _):
            blocks[block].zeroPages += 1
            return
        case .pageDelta(let block, _, _):
            blocks[block].deltaPages += 1
            return
        case .pageBatch(let block, let runs):
            for run in runs {
                if run.kind == .data { blocks[block].dataPages += UInt64(run.pages) }
                if run.kind == .zero { blocks[block].zeroPages += UInt64(run.pages) }
            }
            return
        case .ramSectionEnded(let type): ramSectionEnded(type)
        case .device(let head, let body):
            let index = index(of: head)
            sections[index].ended = true
            account(index, bodyBytes: UInt64(body.count))
        case .inferredSection(let head, let type, let bodyBytes):
            let index = index(of: head)
            sections[index].inferred = true
            sections[index].ended = type == .full || type == .end
            if type == .part || type == .end { sections[index].rounds += 1 }
            account(index, bodyBytes: bodyBytes)
        case .command(let command):
            commandCount += 1
            if commands.count < Self.commandsKept {
                commands.append(Command(position: sectionStart, command: command))
            }
        case .endOfStream: isComplete = true
        case .vmDescription: descriptionBytes = []
        }
        sectionStart = decoder.position
    }

    private mutating func ramSectionEnded(_ type: SectionType) {
        let head = SectionHead(
            type: .start, id: decoder.sectionID, name: Wire.ramSectionName, instance: 0,
            version: Wire.ramSectionVersion)
        let index = index(of: head)
        let headBytes: UInt64 = type == .start ? 14 + UInt64(Wire.ramSectionName.utf8.count) : 5
        if type != .start { sections[index].rounds += 1 }
        sections[index].ended = type == .end
        account(index, bodyBytes: decoder.position - sectionStart - headBytes - 5)
    }

    private mutating func account(_ index: Int, bodyBytes: UInt64) {
        sections[index].bytes += decoder.position - sectionStart
        sections[index].bodyBytes += bodyBytes
    }

    private mutating func index(of head: SectionHead) -> Int {
        if let index = sectionIndex[head.id] { return index }
        sections.append(
            Section(id: head.id, name: head.name, instance: head.instance, version: head.version))
        sectionIndex[head.id] = sections.count - 1
        return sections.count - 1
    }
}
